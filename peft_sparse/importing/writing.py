"""Imported adapters, written: all of it or nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.adapter_files import CONFIG_FILE
from ..checkpoints.native import SOURCE, build
from ..checkpoints.output import save_adapter
from ..core.names import PREFIX
from ..files import AtomicFolder
from ..tuners.sparse_ft.configs.base import SparseConfig
from .foreign import Foreign
from .rosa import LowRank

SPARSE_FOLDER, LORA_FOLDER = "sparse", "lora"


def write_sparse(directory: str | os.PathLike[str], foreign: Foreign, config: SparseConfig, *, overwrite: bool) -> int:
    """Write the sparse adapter.

    Args:
        directory: where.
        foreign: the adapter.
        config: of it.
        overwrite: replace an adapter that is there.

    Returns:
        bytes of its file.
    """
    tensors = build(foreign.deltas, foreign.heads, values_dtype=getattr(torch, config.values_dtype))
    return save_adapter(directory, tensors, config, overwrite=overwrite)


def write_both(
    output: Path, foreign: Foreign, config: SparseConfig | None, low_rank: LowRank | None, common: Mapping[str, Any]
) -> tuple[str | None, str | None, int]:
    """Write RoSA's two parts, as far as there are two.

    Args:
        output: the folder that they lie in, which is there or not; an earlier import in it is replaced.
        foreign: the sparse part, and the heads.
        config: of the sparse part; None if there is none.
        low_rank: the other one.
        common: fields that both configs have.

    Returns:
        the two folders, None for a part that there is not; bytes of the sparse adapter's file.
    """
    sparse, lora, size = None, None, 0
    parts, doors = (SPARSE_FOLDER, LORA_FOLDER), (SOURCE, CONFIG_FILE)
    with AtomicFolder(
        output, overwrite=True, what="adapters", is_replaced=lambda name: name in parts, doors=doors
    ) as folder:
        if config is not None:
            size = write_sparse(folder.staging / SPARSE_FOLDER, foreign, config, overwrite=False)
            sparse = os.fspath(output / SPARSE_FOLDER)
        if low_rank is not None:
            _save_lora(folder.staging / LORA_FOLDER, low_rank, foreign.heads if config is None else {}, common)
            lora = os.fspath(output / LORA_FOLDER)
    return sparse, lora, size


def _save_lora(folder: Path, low_rank: LowRank, heads: Mapping[str, Tensor], common: Mapping[str, Any]) -> None:
    """Write the low-rank part as an adapter of PEFT's; the heads too, where there is no sparse part to hold them."""
    folder.mkdir(parents=True)
    tensors = {**low_rank.tensors, **{PREFIX + name: tensor.contiguous() for name, tensor in heads.items()}}
    save_file(tensors, folder / SOURCE, metadata={"format": "pt"})
    config = LoraConfig(
        **low_rank.fields, **{**common, "modules_to_save": common["modules_to_save"] if heads else None}
    )
    config.save_pretrained(os.fspath(folder))

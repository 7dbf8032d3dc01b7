"""Sparse adapters as their files hold them, without a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor

from ..core.delta import SparseDelta
from ..errors import ConfigError, FormatError
from .files import verify_file
from .native import DIGEST_KEY, SOURCE, canonical_name, parameter_of

CONFIG_FILE = "adapter_config.json"


@dataclass
class AdapterFiles:
    """What the files of a sparse adapter hold.

    Attributes:
        source: directory or repository.
        config: the content of adapter_config.json.
        deltas: {parameter: delta}, empty ones left out, values in the dtype that a model would hold them in.
        others: {name: tensor} of what else is in the file: heads, and embeddings that PEFT put there.
    """

    source: str
    config: dict[str, Any]
    deltas: dict[str, SparseDelta]
    others: dict[str, Tensor]

    @property
    def heads(self) -> dict[str, Tensor]:
        """The tensors of `modules_to_save`."""
        modules = tuple(self.config.get("modules_to_save") or ())
        return {name: tensor for name, tensor in self.others.items() if _lies_in(name, modules)}


def read_adapter(source: str) -> AdapterFiles:
    """Read and check the files of a sparse adapter.

    Args:
        source: a directory that `save_pretrained` wrote, or a repository on the Hub.

    Raises:
        FormatError: there is no adapter, or it is damaged.
        ConfigError: it is of another type, or trains rows of an embedding beside the delta.
    """
    config = json.loads(_find_file(source, CONFIG_FILE).read_text(encoding="utf-8"))
    if config.get("peft_type") != "SPARSE_FT":
        raise ConfigError(
            f"{source} is an adapter of type {config.get('peft_type')}; only sparse ones (SPARSE_FT) merge this way. "
            "Load it with PEFT and call merge_and_unload()."
        )
    path = _find_file(source, SOURCE)
    deltas = verify_file(path, counts=config.get("counts"))
    values_dtype = getattr(torch, config.get("values_dtype", "float32"))
    named = {canonical_name(key): tensor for key, tensor in load_file(path).items()}
    others = {name: tensor for name, tensor in named.items() if parameter_of(name) is None and name != DIGEST_KEY}
    if config.get("trainable_token_indices"):
        raise ConfigError(
            f"{source} trains rows of the embedding (trainable_token_indices), which cannot be merged this way. "
            "Load it with PEFT and call merge_and_unload()."
        )
    tuned = {n: SparseDelta(d.indices, d.values.to(values_dtype), d.shape) for n, d in deltas.items() if d.count}
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in others.items()}
    return AdapterFiles(source, config, tuned, plain)


def _find_file(source: str, name: str) -> Path:
    if Path(source).is_dir():
        if not Path(source, name).is_file():
            raise FormatError(f"{source} is no adapter of peft_sparse: it has no {name}.")
        return Path(source, name)
    try:
        return Path(hf_hub_download(source, name))
    except HFValidationError as error:
        raise FormatError(f"{source!r} is neither a directory nor the name of a repository on the Hub.") from error
    except (EntryNotFoundError, LocalEntryNotFoundError) as error:
        raise FormatError(f"{source} has no {name}, or it cannot be reached: {error}") from error


def _lies_in(parameter: str, modules: tuple[str, ...]) -> bool:
    pieces = parameter.split(".")
    return bool(modules) and any(".".join(pieces[:end]).endswith(modules) for end in range(1, len(pieces)))

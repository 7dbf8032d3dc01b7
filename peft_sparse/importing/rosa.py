"""Adapters of RoSA (`peft_type` "ROSA"): a low-rank part and a sparse one on the same weights, W + s B A + S.

The sparse part becomes an adapter of ours, the low-rank part one of PEFT's own LoRA. Their sum is RoSA's.

Source of the format: IST-DASLab/peft-rosa. No code of it is here. S is in compressed rows: `row_offs` [out + 1],
`col_idx` [nnz] and `values` [nnz]; what else is stored of it are orders of work for its kernels.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..checkpoints.architecture import Names
from ..core.delta import SparseDelta
from ..core.indices import index_dtype
from ..core.names import PREFIX
from ..errors import ConfigError, FormatError
from .base_model_check import parameters_of
from .foreign import ROSA, Foreign, check_finite, check_holdable
from .torch_file import TorchFile

# Columns are stored in 16 bits, with a sign that they have not.
_COLUMNS = 2**16
_SPARSE = re.compile(r"(?P<module>.+)\.rosa_spa\.(?P<part>\w+)")
_LOW_RANK = re.compile(r"(?P<module>.+)\.rosa_(?P<part>A\.weight|B\.weight|embedding_A|embedding_B)")
_SETTINGS = ("d", "r", "lora_alpha", "rosa_dtype", "spa_num_grads", "grad_acc_mode", "schedule")


@dataclass(frozen=True, eq=False)
class LowRank:
    """The low-rank part.

    Attributes:
        tensors: under the keys of PEFT's LoRA.
        fields: of `peft.LoraConfig`.
    """

    tensors: Mapping[str, Tensor]
    fields: Mapping[str, Any]


def read_rosa(
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    config: PretrainedConfig | None,
    *,
    base: str,
    path: Path,
    source: str,
) -> tuple[Foreign, LowRank | None]:
    """Read an adapter of RoSA.

    Args:
        settings: the content of its adapter_config.json.
        tensors: the content of its weights file.
        config: of the base model; without it the shapes are those that the low-rank part has.
        base: what errors call the base model.
        path, source: of the result.

    Returns:
        the sparse part, with heads and perhaps no difference; the low-rank part, if there is one.

    Raises:
        FormatError: it is damaged, more than a difference of weights, or does not fit the base.
        ConfigError: the shape of a weight can be had from neither.
    """
    _check_settings(settings, source)
    sparse, low_rank, heads = _sorted_in(tensors, source)
    if settings.get("fan_in_fan_out") and any(_is_masked(parts) for parts in sparse.values()):
        raise FormatError(
            f"{source} has fan_in_fan_out=True and a sparse part, whose merge RoSA itself does in two directions at "
            "once: the low-rank part transposed and the sparse part not. What was trained is not known."
        )
    task_type = settings.get("task_type")
    shapes: dict[str, tuple[int, ...]] = {module: _shape_of(parts) for module, parts in low_rank.items()}
    if config is not None:
        wanted = [f"{module}.weight" for module in {**sparse, **low_rank}]
        model, own = parameters_of(config, wanted, task_type=task_type, base=base, source=source)
        known = Names(model).parameters
        in_base = {name.removesuffix(".weight"): tuple(known[own[name]].shape) for name in wanted}
        _check_shapes(shapes, in_base, base=base, source=source)
        shapes |= in_base
    deltas = {}
    for module, parts in sparse.items():
        if not _is_masked(parts):
            continue
        if module not in shapes:
            raise ConfigError(
                f"{source} does not say how many columns {module} has. Give a folder that holds the config.json of "
                "the base model: base=... (--base)."
            )
        deltas[f"{module}.weight"] = _delta(parts, shapes[module], f"{source}: {module}")
    deltas = {name: delta for name, delta in deltas.items() if delta.count}
    check_holdable(deltas, source)
    if not deltas and not low_rank:
        raise FormatError(
            f"{source} has neither a low-rank part nor a mask: RoSA never generated it. Nothing to import."
        )
    kept = {key: settings[key] for key in _SETTINGS if settings.get(key) is not None}
    foreign = Foreign(ROSA, source, path, deltas, heads, task_type=task_type, settings=kept)
    return foreign, _lora(settings, low_rank) if low_rank else None


def import_mask(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The mask that RoSA saved (`mask_save_path`), as a support for `GivenConfig(support=...)`.

    Args:
        path: the file: {module: bool tensor of the weight's shape}.

    Returns:
        {parameter: [k] int64 flat row-major positions}.

    Raises:
        FormatError: it is no such file.
    """
    support = {}
    for name, mask in TorchFile(path).tensors().items():
        if mask.dtype != torch.bool:
            raise FormatError(f"{os.fspath(path)}: {name!r:.200} must be a mask of bools, got {mask.dtype}.")
        parameter = name.removeprefix(PREFIX).removesuffix(".weight")
        support[f"{parameter}.weight"] = mask.flatten().nonzero().squeeze(1)
    return support


def _check_settings(settings: Mapping[str, Any], source: str) -> None:
    if settings.get("bias", "none") != "none":
        raise FormatError(
            f"{source} has trained biases (bias={settings['bias']!r}), whole, and what they were before is not in it. "
            "Merge it with RoSA, and take the difference: peft-sparse diff"
        )


def _sorted_in(
    tensors: Mapping[str, Tensor], source: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """{module: its sparse tensors}, {module: its low-rank tensors}, and the heads."""
    sparse: dict[str, dict[str, Tensor]] = {}
    low_rank: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if (found := _SPARSE.fullmatch(name)) is not None:
            sparse.setdefault(found["module"], {})[found["part"]] = tensor
        elif (found := _LOW_RANK.fullmatch(name)) is not None:
            low_rank.setdefault(found["module"], {})[found["part"]] = tensor
        elif ".rosa_" in f".{name}":
            raise FormatError(
                f"{source} holds {key!r:.200}, which is not part of RoSA's format. Save one adapter alone."
            )
        else:
            heads[name] = tensor
    for module, parts in sparse.items():
        if lacking := {"values", "row_offs", "col_idx"} - parts.keys():
            raise FormatError(f"{source} lacks {sorted(lacking)} of {module}. Get it again.")
    for module, parts in low_rank.items():
        if set(parts) not in ({"A.weight", "B.weight"}, {"embedding_A", "embedding_B"}):
            raise FormatError(f"{source} holds only {sorted(parts)} of the low-rank part of {module}. Get it again.")
    return sparse, low_rank, heads


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]], in_base: Mapping[str, tuple[int, ...]], *, base: str, source: str
) -> None:
    for module, shape in shapes.items():
        if sorted(shape) != sorted(in_base[module]):
            raise FormatError(
                f"{source}: {module} has shape {list(shape)} in the adapter and {list(in_base[module])} in {base}. "
                "Nothing was written. Give the base model that it was trained on: base=... (--base)."
            )


def _is_masked(parts: Mapping[str, Tensor]) -> bool:
    """Whether the mask was ever set: until then every row is empty, whatever the other tensors hold."""
    return bool(parts["row_offs"].any())


def _shape_of(parts: Mapping[str, Tensor]) -> tuple[int, int]:
    """[out, in] of a linear weight, or [vocabulary, size] of an embedding, by the low-rank part."""
    if "A.weight" in parts:
        return parts["B.weight"].shape[0], parts["A.weight"].shape[-1]
    return parts["embedding_A"].shape[-1], parts["embedding_B"].shape[0]


def _delta(parts: Mapping[str, Tensor], shape: tuple[int, ...], name: str) -> SparseDelta:
    values, offsets, columns = parts["values"], parts["row_offs"].long(), parts["col_idx"]
    if len(shape) != 2 or offsets.shape != (shape[0] + 1,):
        raise FormatError(
            f"{name}: row_offs must hold {shape[0] + 1} numbers for shape {list(shape)}, got "
            f"{list(offsets.shape)}. Give the base model that it was trained on."
        )
    if values.dim() != 1 or not values.is_floating_point() or columns.shape != values.shape:
        raise FormatError(f"{name}: there must be one value for each column, got {values.shape} and {columns.shape}.")
    if int(offsets[0]) != 0 or int(offsets[-1]) != values.numel() or bool((offsets[1:] < offsets[:-1]).any()):
        raise FormatError(f"{name}: row_offs must rise from 0 to the {values.numel()} values.")
    if shape[1] > _COLUMNS and columns.dtype == torch.int16:
        raise FormatError(
            f"{name}: has {shape[1]} columns, and RoSA stores them in 16 bits, which say up to {_COLUMNS}. Which ones "
            "were tuned cannot be told."
        )
    if columns.dtype not in (torch.int16, torch.int32, torch.int64):
        raise FormatError(f"{name}: col_idx must be whole numbers, got {columns.dtype}.")
    check_finite(values, name)
    unsigned = columns.long() & 0xFFFF if columns.dtype == torch.int16 else columns.long()
    if unsigned.numel() and not 0 <= int(unsigned.min()) <= int(unsigned.max()) < shape[1]:
        raise FormatError(
            f"{name}: columns must lie in [0, {shape[1]}), got {int(unsigned.min())} to {int(unsigned.max())}. Give "
            "the base model that it was trained on."
        )
    rows = torch.repeat_interleave(torch.arange(shape[0]), offsets.diff())
    flat, order = (rows * shape[1] + unsigned).sort()
    if bool((flat[1:] == flat[:-1]).any()):
        raise FormatError(f"{name}: a position is there twice, so it is not known what is added to that weight.")
    return SparseDelta(flat.to(index_dtype(prod(shape))), values[order], tuple(shape))


def _lora(settings: Mapping[str, Any], low_rank: Mapping[str, Mapping[str, Tensor]]) -> LowRank:
    tensors = {
        f"{PREFIX}{module}.lora_{part}": tensor.contiguous()
        for module, parts in low_rank.items()
        for part, tensor in parts.items()
    }
    fields = {
        "r": settings.get("r", 8),
        "lora_alpha": settings.get("lora_alpha", 8),
        "lora_dropout": settings.get("lora_dropout", 0.0),
        "use_rslora": settings.get("use_rslora", False),
        "rank_pattern": settings.get("rank_pattern") or {},
        "alpha_pattern": settings.get("alpha_pattern") or {},
        "fan_in_fan_out": settings.get("fan_in_fan_out", False),
        "target_modules": sorted(low_rank),
    }
    return LowRank(tensors, fields)

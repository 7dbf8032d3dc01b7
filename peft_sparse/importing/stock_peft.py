"""Sparse adapters as adapters of PEFT's own types, so that PEFT loads them without this package."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, nextafter, prod
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoints.adapter_files import CONFIG_FILE, AdapterFiles
from ..checkpoints.native import SOURCE
from ..checks import check_whole
from ..core.delta import SparseDelta
from ..core.names import PREFIX
from ..errors import ConfigError
from ..files import AtomicFolder, save_tensors
from .base_model_check import config_of_base, parameters_of
from .extra_tensors import refuse_extra_tensors

STOCK = SHIRA, SUPERTUNING, LORA = "shira", "supertuning", "lora"

_WAY_OUT = "Merge the adapter instead (peft-sparse merge), or train one on linear layers alone."
# Matrices whose smaller side is no longer than this are decomposed exactly, others by random projections.
_EXACT_SIDE = 1024
_OVERSAMPLED, _POWER_STEPS = 16, 4


@dataclass(frozen=True)
class StockAdapter:
    """What was written.

    Attributes:
        path: the weights.
        padding: weights that the format made necessary beside the adapter's own, all with a difference of zero.
        error: how far the difference is from the adapter's, as a share of its Euclidean norm; 0 where it is the same.
    """

    path: Path
    padding: int = 0
    error: float = 0.0


def write_stock_adapter(
    files: AdapterFiles, output: Path, *, kind: str, base: str | None, rank: int | None, overwrite: bool
) -> StockAdapter:
    """Write a sparse adapter as SHiRA's, Super-Tuning's or LoRA's.

    Args:
        files: the adapter.
        output: the folder.
        kind: `SHIRA`, `SUPERTUNING` or `LORA`.
        base: folder or Hub id of the base model, of which config.json is read; what the adapter says if None.
        rank: of LoRA.
        overwrite: replace what is in the folder.

    Raises:
        ConfigError: a parameter that the type cannot hold, something beside the deltas that it has no place for, or a
            base without a config.
        FormatError: the base lacks parameters of the adapter.

    Cost: one dense weight at a time, and with LoRA its singular vectors.
    """
    layers = _linear_layers(files, kind, base)
    make = {SHIRA: _shira, SUPERTUNING: _supertuning, LORA: _lora}[kind]
    made = make({name: files.deltas[f"{name}.weight"] for name in layers}, layers, rank)
    tensors = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in {**made.tensors, **files.others}.items()}
    config = made.config(
        target_modules=list(layers),
        modules_to_save=files.config.get("modules_to_save"),
        task_type=files.config.get("task_type"),
        base_model_name_or_path=files.config.get("base_model_name_or_path"),
        revision=files.config.get("revision"),
        inference_mode=True,
        **made.fields,
    )
    with AtomicFolder(output, overwrite=overwrite, what="adapter", doors=(SOURCE, CONFIG_FILE)) as folder:
        save_tensors(tensors, folder.staging / SOURCE, metadata={"format": "pt"})
        config.save_pretrained(os.fspath(folder.staging))
    return StockAdapter(output / SOURCE, made.padding, made.error)


@dataclass(frozen=True)
class _Made:
    config: Callable[..., PeftConfig]
    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    padding: int = 0
    error: float = 0.0


def _linear_layers(files: AdapterFiles, kind: str, base: str | None) -> dict[str, nn.Module]:
    """{path of the layer: the layer, on the meta device} of all deltas that are not empty.

    Raises:
        ConfigError: one of them is no weight of a linear layer.
    """
    refuse_extra_tensors(files, kind)
    names = [name for name, delta in files.deltas.items() if delta.count]
    if not names:
        raise ConfigError(f"'{files.source}' changes no weight: there is nothing to export.")
    where = base or files.config.get("base_model_name_or_path")
    reason = f"what layers '{files.source}' tunes has to be known to write it as {kind}"
    if where is None:
        raise ConfigError(f"{reason}, and it names no base model. Give one: base=... (--base).")
    revision = None if base else files.config.get("revision")
    config = config_of_base(where, revision=revision, reason=reason)
    assert config is not None  # there is a reason
    task = files.config.get("task_type")
    model, found = parameters_of(config, names, task_type=task, base=where, source=f"'{files.source}'")
    known = (nn.Linear, Conv1D) if kind == LORA else (nn.Linear,)
    layers: dict[str, nn.Module] = {}
    refused = []
    for name in names:
        path, _, part = name.rpartition(".")
        layer = model.get_submodule(found[name].rpartition(".")[0])
        if part != "weight" or not isinstance(layer, known):
            refused.append(f"{name} ({type(layer).__name__})")
        layers[path] = layer
    if refused:
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise ConfigError(
            f"'{files.source}' changes {len(refused)} parameters that are not weights of linear layers, and {kind} "
            f"holds nothing else: {', '.join(refused[:5])}{more}. {_WAY_OUT}"
        )
    return layers


def _shira(deltas: Mapping[str, SparseDelta], layers: Mapping[str, nn.Module], rank: int | None) -> _Made:
    """Positions as [2, k] rows and columns, where k is r(in + out) in every layer, with one r."""
    _check_no_rank(SHIRA, rank)
    r = max(ceil(delta.count / sum(delta.shape)) for delta in deltas.values())
    tensors: dict[str, Tensor] = {}
    padding = 0
    for name, delta in deltas.items():
        count = r * sum(delta.shape)
        if count > prod(delta.shape):
            raise ConfigError(
                f"{name}: SHiRA has r(in + out) weights in each layer with one r for all, here {r}, and "
                f"{list(delta.shape)} has fewer weights than {count}. Export to {SUPERTUNING}."
            )
        positions, values = _padded(delta, count)
        tensors[f"{name}.shira_indices"] = torch.stack([positions // delta.shape[1], positions % delta.shape[1]]).int()
        tensors[f"{name}.shira_weight"] = values
        padding += count - delta.count
    return _Made(ShiraConfig, {"r": r, "random_seed": 0}, tensors, padding, _rounding(deltas))


def _supertuning(deltas: Mapping[str, SparseDelta], layers: Mapping[str, nn.Module], rank: int | None) -> _Made:
    """Flat positions, where the number of them is one share of every layer's weights."""
    _check_no_rank(SUPERTUNING, rank)
    sparsity = 1 - max(delta.count / prod(delta.shape) for delta in deltas.values())
    while any(_supertuned(delta.shape, sparsity) < delta.count for delta in deltas.values()):
        sparsity = max(0.0, nextafter(sparsity, 0.0))
    tensors: dict[str, Tensor] = {}
    padding = 0
    for name, delta in deltas.items():
        count = _supertuned(delta.shape, sparsity)
        positions, values = _padded(delta, count)
        tensors[f"{name}.supertuning_indices"] = positions.int()
        tensors[f"{name}.supertuning_values"] = values
        padding += count - delta.count
    return _Made(SupertuningConfig, {"sparsity": sparsity}, tensors, padding, _rounding(deltas))


def _supertuned(shape: tuple[int, ...], sparsity: float) -> int:
    """How many weights PEFT's Super-Tuning makes of a sparsity: it has to be computed as there."""
    return int(prod(shape) * (1 - sparsity))


def _padded(delta: SparseDelta, count: int) -> tuple[Tensor, Tensor]:
    """A support filled up with the first positions that are not in it: [count] int64 sorted, and [count] float32."""
    dense = torch.zeros(prod(delta.shape))
    taken = torch.zeros(dense.shape, dtype=torch.bool)
    dense[delta.indices.long()] = delta.values.float()
    taken[delta.indices.long()] = True
    taken[(~taken).nonzero().squeeze(1)[: count - delta.count]] = True
    positions = taken.nonzero().squeeze(1)
    return positions, dense[positions]


def _rounding(deltas: Mapping[str, SparseDelta]) -> float:
    """What float64 differences lose in float32, as a share of their norm; 0 for all others."""
    values = torch.cat([delta.values.double() for delta in deltas.values()])
    norm = values.norm()
    return float((values - values.float()).norm() / norm) if norm else 0.0


def _lora(deltas: Mapping[str, SparseDelta], layers: Mapping[str, nn.Module], rank: int | None) -> _Made:
    """The nearest matrices of a rank (Eckart and Young): the leading singular vectors of each difference."""
    if rank is None:
        raise ConfigError(
            "a sparse difference is of full rank, and LoRA comes as near as its rank allows: give one, rank=... "
            "(--rank), and look at the error."
        )
    check_whole("rank", rank)
    tensors: dict[str, Tensor] = {}
    lost = whole = 0.0
    for name, delta in deltas.items():
        dense = delta.to_dense().float()
        dense = dense.t() if isinstance(layers[name], Conv1D) else dense
        up, down = _factors(dense, rank)
        lost += float((dense.double() - up.double() @ down.double()).square().sum())
        whole += float(dense.double().square().sum())
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
    transposed = {isinstance(layer, Conv1D) for layer in layers.values()}
    fields = {"r": rank, "lora_alpha": rank, "fan_in_fan_out": transposed == {True}}
    return _Made(LoraConfig, fields, tensors, error=(lost / whole) ** 0.5 if whole else 0.0)


def _factors(dense: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[out, rank] and [rank, in], zeros where the matrix has no more singular values."""
    if min(dense.shape) <= _EXACT_SIDE:
        u, s, v = torch.linalg.svd(dense, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, right = torch.svd_lowrank(dense, q=min(rank + _OVERSAMPLED, *dense.shape), niter=_POWER_STEPS)
        v = right.t()
    kept, root = min(rank, s.numel()), s.sqrt()
    up, down = dense.new_zeros(dense.shape[0], rank), dense.new_zeros(rank, dense.shape[1])
    up[:, :kept], down[:kept] = (u * root)[:, :kept], (root[:, None] * v)[:kept]
    return up, down


def _check_no_rank(kind: str, rank: int | None) -> None:
    if rank is not None:
        raise ConfigError(f"rank is LoRA's: {kind} holds the differences themselves. Leave it out.")

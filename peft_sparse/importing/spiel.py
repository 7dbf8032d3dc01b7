"""Adapters of the SpIEL fork of PEFT (AlanAnsell/peft, `peft_type` "SFT"): flat positions, not sorted, and values.

Source of the format: that fork's main branch, as its files are saved. No code of it is here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
from ..selection.schedule import Schedule
from .base_model_check import parameters_of
from .foreign import SPIEL, Foreign, check_finite, check_holdable

METHODS = {"rigl": "spiel_ag", "sm3": "spiel_ma"}
_DELTA = re.compile(r"(?P<module>.+)\.sft_delta\.(?P<part>values|indices)")
# What the record keeps of their configuration.
_SETTINGS = (
    "selection_algorithm",
    "density",
    "num_tunable_weights",
    "reselection_steps",
    "selection_accumulation_steps",
    "reselection_rate_policy",
    "initial_reselection_rate",
)


def read_spiel(
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    config: PretrainedConfig,
    *,
    base: str,
    path: Path,
    source: str,
) -> Foreign:
    """Read an adapter of the SpIEL fork.

    Args:
        settings: the content of its adapter_config.json.
        tensors: the content of its weights file.
        config: of the base model: the file does not say what shapes the positions count in.
        base: what errors call the base model.
        path, source: of the result.

    Raises:
        FormatError: it is of a branch that changes the base model, holds several adapters, or does not fit the base.
    """
    algorithm = settings.get("selection_algorithm", "rigl")
    if not isinstance(algorithm, str) or algorithm not in METHODS:
        raise FormatError(
            f"{source}: selection_algorithm is {algorithm!r}, and only {sorted(METHODS)} leave the base model as it "
            "is. The fork's other branches (acc_rigl, acc_sm3, global_alloc) merge weights into it while they train, "
            "so that the file is not all of the change. Merge it with that branch, and take the difference: "
            "peft-sparse diff"
        )
    pairs, heads = _sorted_in(tensors, source)
    _check_counts(settings.get("num_deltas"), pairs, source)
    names = [f"{module}.weight" for module in pairs]
    task_type = settings.get("task_type")
    model, own = parameters_of(config, names, task_type=task_type, base=base, source=source)
    shapes = {name: tuple(parameter.shape) for name, parameter in Names(model).parameters.items()}
    deltas = {}
    for module, pair in pairs.items():
        delta = _delta(pair["values"], pair["indices"], shapes[own[f"{module}.weight"]], f"{source}: {module}")
        if delta.count:
            deltas[f"{module}.weight"] = delta
    check_holdable(deltas, source)
    kept = {key: settings[key] for key in _SETTINGS if settings.get(key) is not None}
    return Foreign(SPIEL, source, path, deltas, heads, task_type=task_type, settings=kept)


def fields_of(settings: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The fields of our config that say the same as theirs, so that training can go on: see `SpielConfig`.

    Args:
        settings: of `Foreign`.
        count: number of tuned weights.
    """
    steps = settings.get("reselection_steps", 20)
    window = settings.get("selection_accumulation_steps", 5)
    rate = settings.get("initial_reselection_rate", 0.2)
    kind = settings.get("reselection_rate_policy", "linear")
    try:
        Schedule(reselection_steps=steps, estimation_steps=window, initial_rate=rate, kind=kind, total_steps=1)
    except (ConfigError, TypeError):
        # No run of ours could have these. They are in the record, and the weights do not depend on them.
        return {"method": "fixed", "num_weights": count}
    return {
        "method": METHODS[settings.get("selection_algorithm", "rigl")],
        "num_weights": count,
        "reselection_steps": steps,
        "estimation_steps": window,
        "initial_reselection_rate": rate,
        "reselection_schedule": kind,
        # The support is a trained one, not the random one that training began with.
        "replace_all_first": False,
    }


def _sorted_in(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """{module: its two tensors}, and the heads."""
    pairs: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        found = _DELTA.fullmatch(name)
        if found is not None:
            pairs.setdefault(found["module"], {})[found["part"]] = tensor
        elif ".sft_delta." in name:
            raise FormatError(
                f"{source} holds {key!r}, so several adapters were saved into one file. Save one alone: "
                "model.save_pretrained(..., selected_adapters=[...]), with the others deleted."
            )
        else:
            heads[name] = tensor
    for module, pair in pairs.items():
        if len(pair) < 2:
            raise FormatError(f"{source} holds only the {next(iter(pair))} of {module}. Get it again.")
    if not pairs:
        raise FormatError(f"{source} holds no tensor of an adapter of the SpIEL fork (sft_delta). Get it again.")
    return pairs, heads


def _check_counts(counts: Any, pairs: Mapping[str, Mapping[str, Tensor]], source: str) -> None:
    if counts is None:
        return
    if not isinstance(counts, dict):
        raise FormatError(f"{source}: num_deltas must map modules to numbers, got a {type(counts).__name__}.")
    for module in [*counts, *pairs]:
        there = pairs[module]["values"].numel() if module in pairs else 0
        if counts.get(module, 0) != there:
            raise FormatError(
                f"{source}: {module} holds {there} weights, but adapter_config.json (num_deltas) says "
                f"{counts.get(module, 0)!r:.20}. Nothing was written. Get the two files again, from one save."
            )


def _delta(values: Tensor, indices: Tensor, shape: tuple[int, ...], name: str) -> SparseDelta:
    if values.dim() != 1 or not values.is_floating_point() or indices.shape != values.shape:
        raise FormatError(f"{name}: there must be one value for each index, got {values.shape} and {indices.shape}.")
    if indices.dtype not in (torch.int32, torch.int64):
        raise FormatError(f"{name}: indices must be int32 or int64, got {indices.dtype}.")
    check_finite(values, name)
    order = indices.long().argsort()
    positions = indices.long()[order]
    if positions.numel() and not 0 <= int(positions[0]) <= int(positions[-1]) < prod(shape):
        raise FormatError(
            f"{name}: indices must lie in [0, {prod(shape)}), for a weight of shape {list(shape)} in the base, got "
            f"{int(positions[0])} to {int(positions[-1])}. Give the base model that it was trained on."
        )
    if bool((positions[1:] == positions[:-1]).any()):
        raise FormatError(f"{name}: an index is there twice, so it is not known what is added to that weight.")
    return SparseDelta(positions.to(index_dtype(prod(shape))), values[order], shape)

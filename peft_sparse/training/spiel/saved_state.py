"""Checks of a reselecting adapter's saved state, before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import FormatError
from ...tuners.sparse_ft.layers.delta import AdapterDelta


def check_state(state: Mapping[str, Tensor], deltas: Mapping[str, AdapterDelta], *, name: str) -> None:
    """Check what `Reselector.state_dict` gave, once it has been through a file.

    Args:
        state: its tensors; see `Reselector.state_dict`.
        deltas: {parameter name: delta} of the adapter, which has to be loaded by now.
        name: what to call the state in an error.

    Raises:
        FormatError: a tensor is missing, or of another number, kind or range than this adapter's.
    """
    for key in ("update", "continues"):
        if key not in state:
            raise FormatError(f"{name}: tensor {key!r} is missing.")
    for key in ("update", "continues", "due"):
        if key in state and (state[key].dim() or state[key].is_floating_point() or int(state[key]) < 0):
            raise FormatError(f"{name}: tensor {key!r} must be one whole number >= 0, got {_shown(state[key])}.")
    for parameter, delta in deltas.items():
        grown = state.get(f"grown_at.{parameter}")
        if grown is None or grown.numel() != delta.count:
            found = "is missing" if grown is None else f"holds {grown.numel()} weights, the adapter {delta.count}"
            raise FormatError(
                f"{name}: tensor 'grown_at.{parameter}' {found}. Load the adapter of the same checkpoint first."
            )
        _check_shape(state, f"grown_at.{parameter}", (delta.count,), name)
        _check_shape(state, f"last_values.{parameter}", (delta.count,), name)
        if len(delta.shape) >= 2:
            _check_shape(state, f"covers.updates.{parameter}", (), name)
            _check_shape(state, f"covers.r.{parameter}", (delta.shape[0],), name)
            _check_shape(state, f"covers.c.{parameter}", (delta.numel // delta.shape[0],), name)
        if f"window.indices.{parameter}" in state:
            _check_window(state, parameter, delta, name)


def _check_window(state: Mapping[str, Tensor], parameter: str, delta: AdapterDelta, name: str) -> None:
    indices = state[f"window.indices.{parameter}"]
    if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise FormatError(f"{name}: tensor 'window.indices.{parameter}' must be indices, got {_shown(indices)}.")
    if indices.numel() and not bool(
        (indices[1:] > indices[:-1]).all() and indices[0] >= 0 and indices[-1] < delta.numel
    ):
        raise FormatError(
            f"{name}: tensor 'window.indices.{parameter}' must be sorted, unique and below {delta.numel}."
        )
    for part in ("nominated", "total", "total_squared", "updates"):
        key = f"window.{part}.{parameter}"
        if key not in state:
            raise FormatError(f"{name}: tensor {key!r} is missing.")
        _check_shape(state, f"window.scale.{parameter}", (), name)
        _check_shape(state, key, () if part == "updates" else (indices.numel(),), name)


def _check_shape(state: Mapping[str, Tensor], key: str, shape: tuple[int, ...], name: str) -> None:
    if key in state and tuple(state[key].shape) != shape:
        raise FormatError(f"{name}: tensor {key!r} must have shape {shape}, got {tuple(state[key].shape)}.")


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"

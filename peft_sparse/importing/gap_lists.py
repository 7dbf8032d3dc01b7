"""Supports as composable-sft writes them: gaps between column-major positions, first index first.

The flat position of element (i0, i1, ...) of a tensor of sizes (s0, s1, ...) is i0 + i1 s0 + i2 s0 s1 + ...: the first
dimension is the fastest. The list holds the first position and then the differences, all of them at least 1.

Source: the format of `pytorch_diff.bin`, cambridgeltl/composable-sft. Its own decoder is wrong for three dimensions and
more, and for positions beyond 2**31; the lists themselves are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.delta import SparseDelta
from ..core.indices import index_dtype
from ..errors import FormatError
from .foreign import check_finite


def decode_gap_list(gaps: NDArray[np.int64], values: Tensor, shape: Sequence[int], *, name: str) -> SparseDelta:
    """A sparse difference from its list of gaps.

    Args:
        gaps: [k] first position, then differences; column-major.
        values: [k] what is added at each position.
        shape: of the parameter.
        name: what errors call the tensor.

    Raises:
        FormatError: the list leaves the shape, goes back, or has not one gap for each value; or a value is NaN or
            infinite.

    Cost: a sort of the positions if there are two dimensions or more, and about 40 bytes of scratch for each.
    """
    if values.dim() != 1 or not values.is_floating_point():
        raise FormatError(f"{name}: values must be a list of floating-point numbers, got {_described(values)}.")
    if values.numel() != gaps.size:
        raise FormatError(f"{name}: there are {gaps.size} index_steps for {values.numel()} values.")
    check_finite(values, name)
    numel = prod(shape)
    if gaps.size and (gaps[0] < 0 or (gaps[1:] < 1).any()):
        raise FormatError(f"{name}: index_steps must start at 0 or more and go on in steps of 1 or more.")
    # A sum that leaves 64 bits turns negative at that place, for no single step is half that long.
    flat = np.cumsum(gaps)
    if gaps.size and (int(gaps.max()) >= numel or flat[-1] >= numel or bool((flat < 0).any())):
        raise FormatError(f"{name}: index_steps lead beyond the {numel} elements of shape {list(shape)}.")
    if len(shape) < 2 or not flat.size:
        order, rows = None, flat
    else:
        positions = np.ravel_multi_index(np.unravel_index(flat, tuple(shape), order="F"), tuple(shape), order="C")
        order = np.argsort(positions, kind="stable")
        rows = positions[order]
    sorted_values = values if order is None else values[torch.from_numpy(order)]
    return SparseDelta(torch.from_numpy(rows).to(index_dtype(numel)), sorted_values, tuple(shape))


def encode_gap_list(delta: SparseDelta) -> tuple[list[int], Tensor]:
    """The list of gaps of a sparse difference, in plain integers, and its values in that order."""
    rows = delta.indices.cpu().numpy().astype(np.int64)
    values = delta.values.detach().cpu()
    if len(delta.shape) >= 2 and rows.size:
        flat = np.ravel_multi_index(np.unravel_index(rows, delta.shape, order="C"), delta.shape, order="F")
        order = np.argsort(flat, kind="stable")
        rows, values = flat[order], values[torch.from_numpy(order)]
    return np.diff(rows, prepend=0).tolist(), values.contiguous()


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"

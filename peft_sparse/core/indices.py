"""Flat index rules: row-major order, sorted and unique, one place that decides the dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends.native import kernels

# Up to so many sorted lists are merged; more are sorted together.
FEW_SUPPORTS = 16


def index_dtype(numel: int) -> torch.dtype:
    """The integer dtype that indexes a tensor of `numel` elements: int32 below 2**31, int64 from there on."""
    return torch.int32 if numel < 2**31 else torch.int64


def check_indices(indices: Tensor, numel: int, *, name: str) -> None:
    """Check that `indices` is a support of a tensor with `numel` elements.

    Args:
        indices: [k] flat row-major positions.
        numel: size of the tensor that they index.
        name: what the error calls the tensor.

    Raises:
        ValueError: not one-dimensional, wrong dtype, out of range, or not strictly ascending.
    """
    if indices.dim() != 1:
        raise ValueError(f"indices of {name} must be one-dimensional, got shape {tuple(indices.shape)}")
    expected = index_dtype(numel)
    if indices.dtype != expected:
        raise ValueError(f"indices of {name} must be {expected} for {numel} elements, got {indices.dtype}")
    if indices.numel() == 0 or indices.is_meta:
        return
    if indices.numel() > 1 and not bool((indices[1:] > indices[:-1]).all()):
        raise ValueError(f"indices of {name} must be strictly ascending (sorted, no duplicates)")
    low, high = int(indices[0]), int(indices[-1])
    if low < 0 or high >= numel:
        raise ValueError(f"indices of {name} must lie in [0, {numel}), got {low} to {high}")


def union(supports: Sequence[Tensor]) -> Tensor:
    """Sorted union [u] of several sorted supports, in the dtype of the first."""
    if len(supports) == 1:
        return supports[0]
    native = kernels(*supports, dtypes=(supports[0].dtype,)) if len(supports) <= FEW_SUPPORTS else None
    if native is not None:
        return native.merge([support.contiguous() for support in supports])[0]
    return torch.unique(torch.cat(list(supports)), sorted=True).to(supports[0].dtype)


def positions(support: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Where each query lies in a sorted support.

    Args:
        support: [k] sorted and unique.
        queries: [q] in any order.

    Returns:
        positions [q] int64, valid where found; found [q] bool.
    """
    if support.numel() == 0:
        return torch.zeros_like(queries, dtype=torch.int64), torch.zeros_like(queries, dtype=torch.bool)
    where = torch.searchsorted(support, queries.to(support.dtype)).clamp_(max=support.numel() - 1)
    return where, support[where] == queries


def checksum(indices: Tensor) -> Tensor:
    """int64 [], a hash of a support; computed on its device, without waiting for the result."""
    places = torch.arange(indices.numel(), device=indices.device)
    # Sums wrap around, and every place has its own odd factor.
    return (indices.long() * (2 * places * 2654435761 + 40503)).sum()

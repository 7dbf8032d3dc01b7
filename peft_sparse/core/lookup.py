"""Looking up rows of an embedding matrix with sparse deltas, differentiably; see `ops`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .indices import positions
from .observer import GradientObserver, current_pass, remember_outer, wanted_on
from .ops import Deltas, is_recorded
from .overlay import Overlay


def embedding(
    ids: Tensor,
    weight: Tensor,
    deltas: Deltas,
    *,
    padding_idx: int | None = None,
    observers: Sequence[GradientObserver] = (),
) -> Tensor:
    """Look up rows of an embedding matrix with sparse deltas, touching no other row.

    Args:
        ids: [...] integer token ids.
        weight: [V, D], without the deltas; gets no gradient.
        deltas: for each delta values [k_i] and indices [k_i] (flat row-major positions in `weight`, sorted and unique).
        padding_idx: row that gets no gradient (as in `torch.nn.Embedding`; it is looked up like any other).
        observers: who else sees the weight's gradient; they see nothing where torch records (`is_recorded`).

    Returns:
        [..., D] in the weight's dtype: bit for bit the rows of the merged weight.

    Cost: one copy of the rows of the distinct ids.
    """
    weight = weight.detach()
    if not deltas:
        return F.embedding(ids, weight)
    if is_recorded():
        return _embedding_static(ids, weight, deltas, padding_idx)
    supports = tuple(index for _, index in deltas)
    flat = _Embedding.apply(ids, weight, padding_idx, supports, tuple(observers), *[value for value, _ in deltas])
    return flat.view(*ids.shape, weight.shape[1])


def _embedding_static(ids: Tensor, weight: Tensor, deltas: Deltas, padding_idx: int | None) -> Tensor:
    """`embedding` with shapes that do not depend on the ids' values: every looked-up entry searches the supports."""
    width = weight.shape[1]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    wanted = ids.unsqueeze(-1).long() * width + torch.arange(width, device=ids.device)
    rows = F.embedding(ids, weight)
    total = torch.zeros(wanted.shape, dtype=dtype, device=weight.device)
    touched = torch.zeros(wanted.shape, dtype=torch.bool, device=weight.device)
    for values, indices in deltas:
        if indices.numel() == 0:
            continue
        where, found = positions(indices, wanted)
        total = total + torch.where(found, values[where].to(dtype), 0)
        touched = touched | found
    if padding_idx is not None:
        total = torch.where((ids == padding_idx).unsqueeze(-1), total.detach(), total)
    return torch.where(touched, (rows.to(dtype) + total).to(rows.dtype), rows)


def _entries_of_rows(indices: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Which entries of a support lie in the given rows.

    Args:
        indices: [k] sorted flat positions in a matrix of `width` columns.
        rows: [u] sorted row numbers.

    Returns:
        entries [e] positions in `indices`; compact [e] flat positions in the [u, width] matrix of those rows alone,
        ascending.
    """
    first = rows.long() * width
    starts = torch.searchsorted(indices, first.to(indices.dtype))
    counts = torch.searchsorted(indices, (first + (width - 1)).to(indices.dtype), right=True) - starts
    row = torch.repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    entries = torch.arange(row.numel(), device=indices.device) + (starts - before)[row]
    return entries, row * width + indices[entries] % width


class _Embedding(torch.autograd.Function):
    """The body of `embedding` outside of compilation, giving [N, D] (see `ops._Linear`)."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        weight: Tensor,
        padding_idx: int | None,
        indices: tuple[Tensor, ...],
        observers: tuple[GradientObserver, ...],
        *values: Tensor,
    ) -> Tensor:
        width = weight.shape[1]
        rows, inverse = torch.unique(ids, return_inverse=True)
        entries, compact = [], []
        for support in indices:
            found, place = _entries_of_rows(support, rows, width)
            entries.append(found)
            compact.append(place)
        tuned = Overlay(compact).add(
            F.embedding(rows, weight), [value[e] for value, e in zip(values, entries, strict=True)]
        )
        ctx.padding_idx, ctx.width, ctx.numel, ctx.observers = padding_idx, width, weight.numel(), observers
        ctx.made_in = current_pass()
        ctx.values = [(value.shape, value.dtype) for value in values]
        ctx.save_for_backward(rows, inverse, *entries, *compact)
        return F.embedding(inverse.reshape(-1), tuned)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, inverse, *saved = ctx.saved_tensors
        entries, compact = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        dtype = torch.promote_types(grad.dtype, torch.float32)
        grad_rows = torch.zeros(rows.numel(), ctx.width, dtype=dtype, device=grad.device)
        grad_rows.index_add_(0, inverse.reshape(-1), grad.reshape(-1, ctx.width).to(dtype))
        if ctx.padding_idx is not None:
            grad_rows[rows == ctx.padding_idx] = 0
        flat = grad_rows.view(-1)
        grad_values: list[Tensor | None] = []
        for i, (shape, values_dtype) in enumerate(ctx.values):
            if not ctx.needs_input_grad[5 + i]:
                grad_values.append(None)
                continue
            gradient = torch.zeros(shape, dtype=values_dtype, device=grad.device)
            gradient.index_copy_(0, entries[i], flat[compact[i]].to(values_dtype))
            grad_values.append(gradient)
        remember_outer(ctx.made_in)
        for observer in ctx.observers:
            observer.receive(_rows_at(flat.detach(), rows, wanted_on(observer, flat.device), ctx.width, ctx.numel))
        return None, None, None, None, None, *grad_values


def _rows_at(flat: Tensor, rows: Tensor, wanted: Tensor | None, width: int, numel: int) -> Tensor:
    """Entries of a gradient of which only some rows are not zero.

    Args:
        flat: [u * width] those rows.
        rows: [u] their sorted numbers.
        wanted: [c] sorted flat positions in the whole gradient; None for all of it.
        width: length of a row.
        numel: size of the whole gradient.
    """
    if wanted is None:
        whole = torch.zeros(numel, dtype=flat.dtype, device=flat.device)
        whole.view(-1, width)[rows] = flat.view(-1, width)
        return whole
    entries, compact = _entries_of_rows(wanted, rows, width)
    result = torch.zeros(wanted.numel(), dtype=flat.dtype, device=flat.device)
    result[entries] = flat[compact]
    return result

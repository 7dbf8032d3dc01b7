"""Products of a few rows with a weight and sparse entries on it, without forming their sum."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .autocast import autocast_dtype
from .backends.native import kernels
from .backends.prepared_calls import SparseProduct

# A weight of fewer elements is copied in less time than it takes to call a kernel.
_WORTH_ADDING = 2**14
# With more rows, forming W' is cheaper for every usual size of weight.
FEW_ROWS = 256


@dataclass(frozen=True, eq=False)
class Parts:
    """A weight W' in two parts, the base weight and the entries added to it.

    For a few rows, one product with each part costs less than forming W'.

    Attributes:
        weight: the weight without deltas, as stored.
        indices: [u] flat positions in it, sorted and unique.
        values: [u] float32, what is added there.
    """

    weight: Tensor
    indices: Tensor
    values: Tensor


GetParts = Callable[[], AbstractContextManager[Parts | None]]


def most_rows(num_entries: int, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32) -> int:
    """The largest number of rows for which a product by parts is cheaper than forming W'; 0 if it never is.

    It holds where there are kernels. Costs are counted in elements of a weight that are copied, as measured with AVX2
    on weights of 512 to 2048 rows and columns that were in no cache. Forming W' costs 1 for each element and 8 for each
    entry. A product by parts costs 185,000 whatever the number of rows, and for every 16 rows 4 for each entry and 17
    for each row or column of the weight. In bfloat16 numbers are widened and rounded on the way, so that no more than
    32 rows pay. Up to 16 rows (generated text) cost less than that, where what they need was looked up before.

    Args:
        num_entries: that W' has beside the weight's own.
        shape: of the weight.
        dtype: of the weight and of the rows.
    """
    numel, of_16_rows = prod(shape), 12 * num_entries + 40 * sum(shape)
    if numel < _WORTH_ADDING or of_16_rows > 4 * numel:
        return 0
    generated = max(1, min(16, 16 * (numel // of_16_rows)))
    gained, cost = numel + 8 * num_entries - 185_000, 4 * num_entries + 17 * sum(shape)
    # What is not sure to pay is not done: other machines copy faster.
    if dtype == torch.bfloat16:
        return max(generated, 16 * min(2, gained // (2 * cost)))
    return min(FEW_ROWS, max(generated, 16 * (17 * gained // (20 * cost))))


def takes_parts(x: Tensor, parts: Parts) -> bool:
    """Whether `add_parts_` takes these inputs, and is cheaper than the product with W' (see `most_rows`).

    Args:
        x: [..., inputs].
        parts: of W'.
    """
    num_rows = x.numel() // max(1, x.shape[-1])
    if x.dtype != parts.weight.dtype:
        return False
    if not 0 < num_rows <= most_rows(parts.indices.numel(), parts.weight.shape, dtype=x.dtype):
        return False
    if parts.values.shape != parts.indices.shape or not parts.weight.is_contiguous():
        return False
    if parts.values.dtype != torch.float32 or autocast_dtype(x) is not None:
        return False
    return kernels(x, parts.weight, dtypes=(torch.float32, torch.bfloat16)) is not None


def add_parts_(y: Tensor, x: Tensor, parts: Parts, *, fan_in_fan_out: bool) -> Tensor:
    """Add to the product with a weight, in place, what the entries add to it, outside of autograd.

    Args:
        y: [..., O], the weight's own product with `x`.
        x: [..., I].
        parts: the weight and the entries, for which `takes_parts` holds.
        fan_in_fan_out: the weight is stored as [I, O].
    """
    native = kernels(x, parts.weight)
    if native is None or y.dtype != x.dtype:
        raise TypeError(f"add_parts_ is for what takes_parts admits, got {y.dtype} for {x.dtype}")
    flat, result = x.detach().reshape(-1, x.shape[-1]).contiguous(), y.reshape(-1, y.shape[-1]).contiguous()
    product = SparseProduct(
        native, parts.indices, dtype=x.dtype, shape=parts.weight.shape, row_is_output=not fan_in_fan_out
    )
    product.add_(result, flat, len(flat), parts.weight.detach(), parts.values)
    return result.view(y.shape)

"""Every operation in its plainest form: dense, differentiated by torch itself: what `ops` and `sddmm` must give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor


def scatter(values: Tensor, indices: Tensor, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    """A dense tensor of zeros with `values` at flat positions `indices`; differentiable with respect to the values."""
    flat = torch.zeros(prod(shape), dtype=dtype, device=values.device)
    return flat.index_put((indices.long(),), values.to(dtype)).view(tuple(shape))


def tuned_weight(weight: Tensor, deltas: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`weight` with all deltas added: summed in float32 or wider, in their order, added, rounded once."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    total = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    for values, indices in deltas:
        total = total + scatter(values, indices, weight.shape, dtype=dtype)
    return (weight.to(dtype) + total).to(weight.dtype)


def linear(
    x: Tensor,
    make_weight: Callable[[], Tensor],
    bias: Tensor | None,
    deltas: Sequence[tuple[Tensor, Tensor]],
    *,
    fan_in_fan_out: bool = False,
) -> Tensor:
    """Twin of `ops.linear`; `make_weight` has to be differentiable with respect to the values here."""
    del deltas
    weight = make_weight()
    return F.linear(x, weight.t() if fan_in_fan_out else weight, bias)


def embedding(
    ids: Tensor,
    weight: Tensor,
    deltas: Sequence[tuple[Tensor, Tensor]],
    *,
    padding_idx: int | None = None,
) -> Tensor:
    """Twin of `lookup.embedding`: a lookup in the dense tuned weight."""
    return F.embedding(ids, tuned_weight(weight, deltas), padding_idx=padding_idx)


def sampled_product(
    grad: Tensor,
    x: Tensor,
    indices: Tensor,
    shape: tuple[int, int],
    *,
    transposed: bool = False,
) -> Tensor:
    """Twin of `sddmm.weight_gradients` for one support: the whole weight gradient, then the entries."""
    dtype = torch.promote_types(torch.promote_types(grad.dtype, x.dtype), torch.float32)
    dense = x.to(dtype).t() @ grad.to(dtype) if transposed else grad.to(dtype).t() @ x.to(dtype)
    return dense.reshape(shape).reshape(-1)[indices.long()]

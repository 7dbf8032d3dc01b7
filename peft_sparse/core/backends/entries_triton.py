"""The kernel behind `entries.add_entries_`. Importing this module loads triton."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _as(number, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    # To and from 16 bits by way of float32, as torch does it; triton's interpreter knows no other way.
    if number.dtype.primitive_bitwidth == 16 or dtype.primitive_bitwidth == 16:
        number = number.to(tl.float32)
    return number.to(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _add(  # type: ignore[no-untyped-def]
    weight, indices, values, originals, count, IN_PLACE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = slot < count
    place = tl.load(indices + slot, mask=there, other=0).to(tl.int64)
    if IN_PLACE:
        own = tl.load(weight + place, mask=there, other=0.0)
    else:
        own = tl.load(originals + slot, mask=there, other=0.0)
    value = tl.load(values + slot, mask=there, other=0.0)
    total = _as(own, WIDE) + _as(value, WIDE)
    tl.store(weight + place, _as(total, weight.dtype.element_ty), mask=there)


def add_entries_(flat: Tensor, indices: Tensor, values: Tensor, originals: Tensor | None = None) -> None:
    """`entries.add_entries_` for tensors on CUDA, or anywhere under triton's interpreter."""
    count = indices.numel()
    if (flat.dtype, values.dtype) == (torch.float16, torch.bfloat16):
        # Seeing both widened for the sum and the sum narrowed to float16, LLVM adds in float16 instead. That is exact
        # for a narrower significand, but a bfloat16 may lie beyond float16's range.
        values = values.float()
    is_wide = torch.float64 in (flat.dtype, values.dtype)
    guard: Any = torch.cuda.device(flat.device) if flat.is_cuda else nullcontext()
    with guard:
        _add[(triton.cdiv(count, _BLOCK),)](
            flat,
            indices,
            values.detach(),
            flat if originals is None else originals,
            count,
            IN_PLACE=originals is None,
            WIDE=tl.float64 if is_wide else tl.float32,
            BLOCK=_BLOCK,
        )

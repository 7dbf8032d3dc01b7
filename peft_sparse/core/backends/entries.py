"""Writing a delta's entries into a weight in place: the plain way, and on CUDA one Triton kernel."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def add_entries_(flat: Tensor, indices: Tensor, values: Tensor, originals: Tensor | None = None) -> None:
    """Write `originals + values` at some positions of a weight: summed in float32 or wider, rounded once.

    Args:
        flat: [numel] contiguous, written in place; no gradient is recorded.
        indices: [u] int32 or int64, unique.
        values: [u] floating point.
        originals: [u] in the dtype of `flat`; what is in the weight if None.

    Cost: on CUDA, where triton is installed, one pass over the four and nothing in between.
    """
    if indices.numel() == 0:
        return
    if takes_kernel(flat, values):
        # Here and not above: triton is loaded when the first tensor needs it, and not before.
        from .entries_triton import add_entries_ as add_by_kernel

        add_by_kernel(flat, indices, values, originals)
    else:
        add_entries_plain_(flat, indices, values, originals)


def add_entries_plain_(flat: Tensor, indices: Tensor, values: Tensor, originals: Tensor | None = None) -> None:
    """Twin of `add_entries_` on any device."""
    where = indices.long()
    own = flat[where] if originals is None else originals
    dtype = torch.promote_types(torch.promote_types(own.dtype, torch.float32), values.dtype)
    flat[where] = (own.to(dtype) + values.detach().to(dtype)).to(flat.dtype)


def takes_kernel(flat: Tensor, values: Tensor) -> bool:
    """Whether the kernel computes it."""
    return flat.is_cuda and flat.dtype in _DTYPES and values.dtype in _DTYPES and _has_triton()


@cache
def _has_triton() -> bool:
    return torch.version.hip is None and find_spec("triton") is not None

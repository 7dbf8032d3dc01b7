"""How far training moved weights: what LT-SFT and extraction rank them by."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SelectionError


def difference(weight: Tensor, original: Tensor) -> Tensor:
    """How training moved each weight.

    Args:
        weight: after training, any shape and floating dtype.
        original: before it, same shape and device.

    Returns:
        weight - original as a new float32 tensor of the same shape. bfloat16, float16 and float32 weights are
        subtracted in float32, so it is 0 if and only if the weight did not move. If either is float64, the difference
        is taken in float64 and rounded once; differences below 1e-45 are then 0.

    Raises:
        SelectionError: the shapes differ.

    Cost: one float32 tensor.
    Source: Ansell et al. 2022, arXiv:2110.07560, section 3.1, ranks by its magnitude.
    """
    if weight.shape != original.shape:
        found = f"{tuple(weight.shape)} and {tuple(original.shape)}"
        raise SelectionError(f"a change is between two states of one weight, got the shapes {found}")
    weight, original = weight.detach(), original.detach()
    if torch.float64 in (weight.dtype, original.dtype):
        return (weight.double() - original.double()).to(torch.float32)
    return weight.to(torch.float32, copy=True).sub_(original)

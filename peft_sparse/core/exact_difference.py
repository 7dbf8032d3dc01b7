"""Values that turn one tensor into another when they are added as the library adds deltas (`overlay.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

# Values of these dtypes are searched for ones that hit; narrower ones are a wish for small files, not for exactness.
_SEARCHED = (torch.float32, torch.float64)


def values_between(base: Tensor, target: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values that turn `base` into `target` when `Overlay` adds them.

    `Overlay` computes fl(base + value) in the wider dtype of the two (at least float32) and rounds to the weight's
    dtype. Both steps are monotone, so if any value of `dtype` hits the target, then one of the two neighbours of the
    true difference does: those are tried. Often there is none: no float32 added to 1 gives 2**-30, for sums near 0 are
    multiples of 2**-24 there, and none added to -1 - 2**-23 gives 1, for the difference needs 25 bits. That takes a
    change of sign or of magnitude. A float64 value reaches every float16 target, and every bfloat16 or float32 one
    unless it is more than 2**29 times smaller than the base and not zero.

    Args:
        base: any shape, floating point, finite.
        target: the same shape, finite. What is to be hit is its value in the wider dtype of the two. Added to a base
            that is the narrower one and stays it, the same values give the target rounded to its dtype.
        dtype: of the values.

    Returns:
        values, of the same shape: where nothing hits, the one that comes closest of those tried, and finite. Equal
            numbers give a zero of the target's sign, which leaves -0 as it is.
        hit, bool: whether the sum equals the target. Zeros are equal here, whatever their signs: a weight that was not
            -0 becomes -0 by no addition.
    """
    merged = torch.promote_types(base.dtype, target.dtype)
    wide = torch.promote_types(torch.promote_types(merged, torch.float32), dtype)
    start, goal = base.to(wide), target.to(merged)
    difference = goal.to(wide) - start
    limit = torch.finfo(dtype).max
    values = torch.where(difference == 0, torch.zeros_like(start).copysign(goal.to(wide)), difference)
    # Beyond the dtype's range lies infinity, which no weight survives.
    values = values.clamp(-limit, limit).to(dtype)

    def misses(candidate: Tensor) -> Tensor:
        return ((start + candidate.to(wide)).to(merged).to(torch.float64) - goal.to(torch.float64)).abs()

    best = misses(values)
    if dtype in _SEARCHED and bool((best > 0).any()):
        for direction in (limit, -limit):
            neighbour = torch.nextafter(values, torch.full_like(values, direction))
            miss = misses(neighbour)
            values, best = torch.where(miss < best, neighbour, values), torch.minimum(miss, best)
    return values, best == 0

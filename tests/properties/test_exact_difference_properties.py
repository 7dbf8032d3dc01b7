"""Values that lead from one weight to another: against a search through all numbers of the values' dtype."""

from __future__ import annotations

import struct

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from peft_sparse.core.exact_difference import values_between
from peft_sparse.core.overlay import Overlay
from tests.support.laws import examples

BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 16}
INTEGERS = {32: torch.int32, 16: torch.int16}


def from_bits(pattern: int, dtype: torch.dtype) -> torch.Tensor:
    bits = BITS[dtype]
    signed = pattern - 2**bits if pattern >= 2 ** (bits - 1) else pattern
    return torch.tensor([signed], dtype=INTEGERS[bits]).view(dtype)


@st.composite
def weights(draw, dtype: torch.dtype) -> torch.Tensor:
    """Any finite number: subnormals, zeros of both signs, the largest."""
    return draw(st.integers(0, 2 ** BITS[dtype] - 1).map(lambda p: from_bits(p, dtype)).filter(lambda t: t.isfinite()))


@st.composite
def pairs(draw) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = draw(st.sampled_from(list(BITS)))
    base = draw(weights(dtype))
    if draw(st.booleans()):
        # Near each other in the order of the numbers, or of the same magnitude: what fine-tuning makes.
        factor = draw(st.floats(-2, 2))
        target = (base.double() * factor).to(dtype)
        return base, target if target.isfinite() else base
    return base, draw(weights(dtype))


def ordered(key: int) -> np.float32:
    """The finite float32 numbers by rank, from the lowest on; the largest has rank 2**32 - 2**25 - 2."""
    lowest = 0xFF7FFFFF
    return np.frombuffer(
        struct.pack("<I", lowest - key if key <= lowest - 0x80000000 else key - (lowest - 0x7FFFFFFF)), np.float32
    )[0]


def some_float32_hits(base: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether fl(base + d) rounds to the target for any float32 d: the sum grows with d, so halve the range."""
    low, high = 0, 2 * (0xFF7FFFFF - 0x80000000) + 1
    start = base.to(torch.float32)
    while low < high:
        middle = (low + high) // 2
        merged = (start + float(ordered(middle))).to(base.dtype)
        low, high = (middle + 1, high) if bool(merged < target) else (low, middle)
    return bool((start + float(ordered(low))).to(base.dtype) == target)


def overlaid(base: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return Overlay([torch.tensor([0], dtype=torch.int32)]).entries(base, [values])


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.view(torch.uint8).tolist() == other.view(torch.uint8).tolist()


@examples(200)
@given(pairs())
@example((torch.tensor([1.0]), torch.tensor([2.0**-30])))
@example((torch.tensor([-1.0 - 2.0**-23]), torch.tensor([1.0])))
@example((torch.tensor([-0.0]), torch.tensor([0.0])))
@example((torch.tensor([3e38]), torch.tensor([-3e38])))
# The numbers below a power of two are closer together: the rounded difference, 1, misses, and its neighbour hits.
@example((torch.tensor([-(2.0**-24)]), torch.tensor([1.0])))
def test_a_float32_is_found_wherever_one_exists(pair):
    base, target = pair
    values, hit = values_between(base, target, dtype=torch.float32)
    merged = overlaid(base, values)
    assert bool(values.isfinite())
    assert bool(hit) == bool(merged == target) == some_float32_hits(base, target)
    # Only the minus sign of a zero may be lost, and only where the weight was not -0 before.
    lost = target == 0 and bool(target.signbit()) and not same_bits(base, target)
    assert not hit or lost or same_bits(merged, target)


@examples(200)
@given(pairs())
def test_a_float64_reaches_what_is_not_too_small_beside_the_base(pair):
    base, target = pair
    values, hit = values_between(base, target, dtype=torch.float64)
    merged = overlaid(base, values)
    assert bool(hit) == bool(merged == target)
    ratio = abs(base.double().item()) / abs(target.double().item()) if target != 0 else 0
    assert bool(hit) or (base.dtype != torch.float16 and ratio > 2**29)


@examples(100)
@given(pairs(), st.sampled_from([torch.float32, torch.float64]))
@example((torch.tensor([-0.0]), torch.tensor([0.0])), torch.float32)
@example((torch.tensor([-0.0], dtype=torch.float16), torch.tensor([0.0])), torch.float64)
def test_equal_weights_stay_as_they_are(pair, dtype):
    base, _ = pair
    values, hit = values_between(base, base.clone(), dtype=dtype)
    assert bool(hit)
    assert same_bits(overlaid(base, values), base)


@examples(100)
@given(weights(torch.bfloat16), weights(torch.float32))
def test_a_narrow_base_reaches_a_wide_target_when_it_is_widened(base, target):
    values, hit = values_between(base, target, dtype=torch.float32)
    assert bool(hit) == bool(overlaid(base.to(torch.float32), values) == target)
    if hit:
        assert bool(overlaid(base, values) == target.to(torch.bfloat16))


def test_the_order_of_the_search_is_that_of_the_numbers():
    last = 2 * (0xFF7FFFFF - 0x80000000) + 1
    finite = np.finfo(np.float32)
    assert (ordered(0), ordered(last)) == (finite.min, finite.max)
    assert ordered(last // 2) == 0 == ordered(last // 2 + 1)
    some = [ordered(key) for key in range(0, last, last // 1000)]
    assert some == sorted(some)

"""Entries written into a weight: the kernel, under triton's interpreter where there is no GPU, and its plain twin."""

from __future__ import annotations

import os
from importlib.util import find_spec
from itertools import product

import pytest
import torch

from peft_sparse.core.backends import entries
from peft_sparse.core.overlay import Overlay

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def kernel():
    """The kernel: compiled where there is a GPU, interpreted where there is none."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed (torch's CUDA wheels bring it; pip install triton for the interpreter)")
    if not HAS_GPU:
        # Read when a kernel is decorated, so the module has to be imported after it; nothing else here uses triton.
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        from peft_sparse.core.backends import entries_triton
    finally:
        if not HAS_GPU:
            del os.environ["TRITON_INTERPRET"]
    return entries_triton.add_entries_


def case(dtype, values_dtype, count, *, index_dtype=torch.int32, device="cpu"):
    generator = torch.Generator().manual_seed(count)
    weight = torch.randn(3000, generator=generator).to(dtype)
    indices = torch.randperm(3000, generator=generator)[:count].sort().values.to(index_dtype)
    # Sums that lie between two numbers of the weight's dtype, and values that vanish beside the weight.
    values = (torch.randn(count, generator=generator) * torch.logspace(-6, 1, max(count, 1))[:count]).to(values_dtype)
    return weight.to(device), indices.to(device), values.to(device)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("dtype", "values_dtype"), list(product(DTYPES, DTYPES)), ids=str)
def test_kernel_equals_its_twin_bit_for_bit(kernel, dtype, values_dtype, in_place):
    for count, index_dtype in ((1, torch.int32), (1023, torch.int64), (2500, torch.int32)):
        weight, indices, values = case(dtype, values_dtype, count, index_dtype=index_dtype, device=DEVICE)
        originals = None if in_place else torch.linspace(-3, 3, count, device=DEVICE).to(dtype)
        expected = weight.clone()
        entries.add_entries_plain_(expected, indices, values, originals)
        kernel(weight, indices, values, originals)
        if HAS_GPU or dtype != torch.bfloat16:
            assert torch.equal(weight, expected)
        else:
            # The interpreter cuts off what a bfloat16 does not hold, where a GPU rounds: one unit in the last place.
            apart = weight.view(torch.int16).int() - expected.view(torch.int16).int()
            assert apart.abs().max() <= 1


@pytest.mark.parametrize(("dtype", "values_dtype"), list(product(DTYPES, DTYPES)), ids=str)
def test_twin_equals_overlay(dtype, values_dtype):
    weight, indices, values = case(dtype, values_dtype, 700, device=DEVICE)
    expected = weight.clone()
    where = indices.long()
    expected[where] = Overlay([indices]).entries(weight[where], [values])
    originals = weight[where].clone()
    for own in (None, originals):
        written = weight.clone()
        entries.add_entries_(written, indices, values, own)
        assert torch.equal(written, expected)
    written = weight.clone()
    Overlay([indices]).write_(written, [values], originals=originals)
    assert torch.equal(written, expected)
    assert torch.equal(Overlay([indices]).add(weight.view(3, 1000), [values]).view(-1), expected)


def test_nothing_is_written_for_an_empty_support():
    weight, indices, values = case(torch.bfloat16, torch.float32, 0)
    before = weight.clone()
    entries.add_entries_(weight, indices, values)
    assert torch.equal(weight, before)


def test_special_values_are_written_as_the_twin_writes_them(kernel):
    special = [float("inf"), -float("inf"), -0.0, 1e-45, 3.4e38, 65504.0, 1e-8]
    weight = torch.tensor(special, device=DEVICE)
    indices = torch.arange(7, dtype=torch.int32, device=DEVICE)
    values = torch.tensor([1.0, 1.0, -0.0, -1e-45, 3.4e38, 40.0, -1e-8], device=DEVICE)
    for dtype in DTYPES if HAS_GPU else (torch.float32, torch.float64, torch.float16):
        expected, found = weight.to(dtype, copy=True), weight.to(dtype, copy=True)
        entries.add_entries_plain_(expected, indices, values)
        kernel(found, indices, values)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_bfloat16_values_beyond_float16_are_added_before_they_are_rounded(kernel):
    weight = torch.tensor([-60000.0, 3e-8, 1.0], device=DEVICE).half()
    indices = torch.arange(3, dtype=torch.int32, device=DEVICE)
    values = torch.tensor([100000.0, 4e-8, -70000.0], device=DEVICE).bfloat16()
    expected = weight.clone()
    entries.add_entries_plain_(expected, indices, values)
    kernel(weight, indices, values)
    assert torch.equal(weight, expected)
    assert weight[0] == 39840.0  # -60000 + 99840, which is what bfloat16 makes of 100000

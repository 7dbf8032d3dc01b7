"""Writing deltas into a weight: every path gives the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_sparse.core.overlay import Overlay, add_deltas

NUMEL = 35


def support(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(NUMEL, generator=generator)[:count].sort().values.int()


@pytest.mark.parametrize("counts", [(12,), (0,), (35,), (12, 20), (0, 9, 35)], ids=str)
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_copy_with_deltas_holds_the_entries_and_nothing_else(dtype, values_dtype, counts):
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(9)).to(dtype)
    weight[2] = -0.0
    indices = [support(count, seed) for seed, count in enumerate(counts)]
    values = [torch.randn(count, generator=torch.Generator().manual_seed(count)).to(values_dtype) for count in counts]
    values[0][: counts[0] // 2] = 0.0
    before = weight.clone()
    overlay = Overlay(indices)
    expected = weight.reshape(-1).clone()
    expected[overlay.indices] = overlay.entries(expected[overlay.indices], values)

    found = overlay.add(weight, values)

    assert found.dtype == dtype
    assert torch.equal(found.reshape(-1), expected)
    assert torch.equal(found.reshape(-1).signbit(), expected.signbit())
    assert torch.equal(weight, before)
    assert torch.equal(found, add_deltas(weight, list(zip(values, indices, strict=True))))


def test_a_weight_that_is_not_contiguous():
    weight = torch.randn(7, 5).t()
    indices, values = support(12, 0), torch.randn(12)
    expected = weight.contiguous().reshape(-1)
    expected[indices.long()] += values
    assert torch.equal(Overlay([indices]).add(weight, [values]), expected.view(5, 7))

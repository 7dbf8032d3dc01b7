"""The merge-drift benchmark, a few cycles long: ours leaves no trace, and the measure sees those that others leave."""

from __future__ import annotations

import pytest
import torch
from merge_drift import compare, small_llama

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_only_subtracting_drifts(dtype):
    results = compare(
        lambda: small_llama(hidden=32, layers=1).to(dtype), cycles=5, adapters=2, rank=2, relative_norm=0.05
    )
    ours = results.pop("peft_sparse")
    assert (ours.once, ours.after, ours.largest) == (0, 0, 0)
    assert results["PEFT LoRA"].after > 0
    assert results["PEFT SHiRA"].after > 0
    assert all(0.9 * ours.trained <= other.trained <= 1.1 * ours.trained for other in results.values())

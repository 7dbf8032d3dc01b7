"""Where the tests of `pytest -m gpu` run: PEFT_SPARSE_GPU_TESTS_ON=cpu rehearses them where there is no accelerator."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("PEFT_SPARSE_GPU_TESTS_ON", "cuda")
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device is at hand"),
]


@pytest.fixture(autouse=True)
def exact_float32():
    """Without TF32: the tolerances are float32's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)

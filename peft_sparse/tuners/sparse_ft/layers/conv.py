"""Sparse deltas on convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .base import SparseLayer


class Conv(SparseLayer):
    """`nn.Conv1d` or `nn.Conv2d` with sparse deltas on its weight and bias."""

    def _delta_forward(self, adapters: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight, bias = self.effective("weight", adapters), self.effective("bias", adapters)
        return self.get_base_layer()._conv_forward(x, weight, bias)

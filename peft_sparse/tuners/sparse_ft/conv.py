"""Sparse deltas on convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .layer import SparseLayer


class Conv(nn.Module, SparseLayer):
    """`nn.Conv1d` or `nn.Conv2d` with sparse deltas on its weight and bias."""

    def __init__(self, base_layer: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        SparseLayer.__init__(self, base_layer)

    def _delta_forward(self, x: Tensor, adapters: Sequence[str]) -> Tensor:
        weight, bias = self.effective("weight", adapters), self.effective("bias", adapters)
        return self.get_base_layer()._conv_forward(x, weight, bias)

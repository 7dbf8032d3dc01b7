"""Sparse deltas on layer norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .base import PARAMETERS, SparseLayer


class LayerNorm(SparseLayer):
    """`nn.LayerNorm` with sparse deltas on its weight and bias."""

    def _delta_forward(self, adapters: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        weight, bias = (self.effective(parameter, adapters) for parameter in PARAMETERS)
        return F.layer_norm(x, base.normalized_shape, weight, bias, base.eps)

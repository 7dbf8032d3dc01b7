"""Sparse deltas on modules whose own forward is left to compute: special norms and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...common.base_module import seen_through
from .base import PARAMETERS, SparseLayer


class OwnForward(SparseLayer):
    """A module that reads `self.weight` and `self.bias` in its forward, with sparse deltas on them.

    The norms of transformers differ in where they round and in whether they scale by w or by 1 + w, and learned
    position embeddings in how they count; so the base layer's own forward computes, on a module like it that has the
    tuned tensors. Nothing that other threads see changes. (`torch.func.functional_call` would write into the module.)
    """

    def _delta_forward(self, adapters: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tuned = {p: self.effective(p, adapters) for p in PARAMETERS if self.active_deltas(p, adapters)}
        return seen_through(self.get_base_layer(), tuned).forward(x, *args, **kwargs)

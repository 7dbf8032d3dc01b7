"""Sparse deltas on modules whose own forward is left to compute: special norms and embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .layer import PARAMETERS, SparseLayer


class OwnForward(SparseLayer):
    """A module that reads `self.weight` and `self.bias` in its forward, with sparse deltas on them.

    The norms of transformers differ in where they round and in whether they scale by w or by 1 + w, and learned
    position embeddings in how they count; so the base layer computes itself, seeing the tuned tensors under their own
    names. (`torch.func.functional_call` would lose the delta under FSDP, which swaps the parameters.)
    """

    def _delta_forward(self, adapters: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tuned = {p: self.effective(p, adapters) for p in PARAMETERS if self.active_deltas(p, adapters)}
        with shadowed(self.get_base_layer(), tuned):
            return self.base_layer(x, *args, **kwargs)


@contextmanager
def shadowed(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> Iterator[None]:
    """Let `module.name` be another tensor for the length of the block; the parameters stay registered and untouched."""
    # An entry of the instance's own dictionary comes before nn.Module.__getattr__, which would look the parameter up.
    module.__dict__.update(tensors)
    try:
        yield
    finally:
        for name in tensors:
            del module.__dict__[name]

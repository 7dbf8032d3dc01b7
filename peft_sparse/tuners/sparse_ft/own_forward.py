"""Sparse deltas on modules whose own forward is left to compute: RMS norms and special embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .layer import SparseLayer


class OwnForward(SparseLayer):
    """A module that reads `self.weight` in its forward, with a sparse delta on that weight.

    The RMS norms of transformers differ in where they round and in whether they scale by w or by 1 + w, and learned
    position embeddings in how they count; so the base layer's own forward computes, seeing the tuned weight under its
    own name. (`torch.func.functional_call` would lose the delta under FSDP, which swaps the parameters.)
    """

    def _delta_forward(self, adapters: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with shadowed(self.get_base_layer(), "weight", self.effective("weight", adapters)):
            return self.base_layer(x, *args, **kwargs)


@contextmanager
def shadowed(module: nn.Module, name: str, tensor: Tensor) -> Iterator[None]:
    """Let `module.name` be `tensor` for the length of the block; the parameter stays registered and untouched."""
    # An entry of the instance's own dictionary comes before nn.Module.__getattr__, which would look the parameter up.
    module.__dict__[name] = tensor
    try:
        yield
    finally:
        del module.__dict__[name]

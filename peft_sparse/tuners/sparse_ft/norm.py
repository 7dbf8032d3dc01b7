"""Sparse deltas on normalisation layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from .layer import PARAMETERS, SparseLayer


class LayerNorm(SparseLayer):
    """`nn.LayerNorm` with sparse deltas on its weight and bias."""

    def _delta_forward(self, x: Tensor, adapters: Sequence[str]) -> Tensor:
        base = self.get_base_layer()
        weight, bias = (self.effective(parameter, adapters) for parameter in PARAMETERS)
        return F.layer_norm(x, base.normalized_shape, weight, bias, base.eps)


class RMSNorm(SparseLayer):
    """Any root-mean-square norm of transformers with a sparse delta on its weight.

    The variants differ in where they round and in whether they scale by w or by 1 + w, so the base layer's own forward
    computes, seeing the tuned weight under its own name. (`torch.func.functional_call` would lose the delta under FSDP,
    which swaps the parameters.)
    """

    def _delta_forward(self, x: Tensor, adapters: Sequence[str]) -> Tensor:
        with shadowed(self.get_base_layer(), "weight", self.effective("weight", adapters)):
            return self.base_layer(x)


@contextmanager
def shadowed(module: nn.Module, name: str, tensor: Tensor) -> Iterator[None]:
    """Let `module.name` be `tensor` for the length of the block; the parameter of that name stays registered and
    untouched.
    """
    # An entry of the instance's own dictionary comes before nn.Module.__getattr__, which would look the parameter up.
    module.__dict__[name] = tensor
    try:
        yield
    finally:
        del module.__dict__[name]

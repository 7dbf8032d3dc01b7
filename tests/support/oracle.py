"""The slow, obviously right twin of a tuned model: the base model, its parameters replaced by dense float64 sums."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from peft_sparse import iter_deltas


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expectation, in float64."""
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt().clamp_min(1e-300))


def dense_twin(base: nn.Module, tuned: nn.Module, adapters: list[str], *, dtype: torch.dtype) -> tuple[nn.Module, dict]:
    """A copy of the base model in `dtype` with every delta added densely.

    Returns:
        the copy; and {(adapter, parameter): dense delta [shape] that requires grad}, from which gradients are read.
    """
    twin = copy.deepcopy(base).to(dtype)
    leaves: dict[tuple[str, str], Tensor] = {}
    for adapter in adapters:
        for name, _, _, delta in iter_deltas(tuned, adapter):
            if delta.count:
                leaves[adapter, name] = delta.delta.to_dense(dtype=dtype).requires_grad_()
    sums: dict[str, Tensor] = {}
    for (_, name), leaf in leaves.items():
        own = twin.get_parameter(name).detach()
        sums[name] = sums.get(name, own) + leaf
    for name, total in sums.items():
        module, _, part = name.rpartition(".")
        owner = twin.get_submodule(module)
        del owner._parameters[part]
        setattr(owner, part, total)
    return twin, leaves

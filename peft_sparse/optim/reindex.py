"""Carrying an optimizer's state to a new support: the only file that knows what optimizers call their state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..selection.replacement import Replacement


@dataclass(frozen=True, eq=False)
class Seeds:
    """What is known of the gradients of grown weights.

    Attributes:
        mean: [n] mean gradient, in the order of `Replacement.grown`, as the optimizer would have seen it.
        mean_square: [n] mean of the squared gradients.
        samples: gamma >= 1, the number of updates that both are means over.
    """

    mean: Tensor
    mean_square: Tensor
    samples: int


def reindex(optimizer: Any, values: Tensor, replacement: Replacement, seeds: Seeds | None = None) -> None:
    """Carry the state of `values` to a new support.

    Args:
        optimizer: a torch optimizer, or a wrapper that holds one in `.optimizer`.
        values: the parameter [k] as the optimizer holds it; only its identity matters.
        replacement: from the old support to the new one.
        seeds: estimates to start grown weights from; None starts them from zero.
    """

"""Watching the gradient of a weight that itself gets none: what a backward pass hands to whoever asks."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class GradientObserver(Protocol):
    """Sees the gradient of one tuned tensor, at positions of its choice, in every backward pass that it is given to."""

    def wanted(self) -> Tensor | None:
        """[c] flat positions, sorted and unique, at which the gradient is wanted; None for all of them."""

    def receive(self, gradient: Tensor) -> None:
        """Take the gradient of one backward pass: [c] at the wanted positions, or the whole of it flat [numel].

        float32 or wider. It is the caller's memory: what is to stay has to be copied.
        """

"""SpIEL-AG's gradient estimation: nominate growth candidates once, then average their gradients over a window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.indices import positions, union
from ..selection.top_k import top_k
from ..tuners.sparse_ft.adapter_delta import AdapterDelta
from .distributed import mean_over_ranks

# Active weights that are watched along with the candidates. The gradient that the optimizer sees is known for them, so
# they tell by how much clipping and loss scaling changed it.
NUM_PROBES = 16


@dataclass
class Estimate:
    """Running sums over the updates of a window.

    Attributes:
        indices: [c] watched positions, sorted and unique: candidates, and a few active weights.
        total: [c] float32, sum of the updates' gradients.
        total_squared: [c] float32, sum of their squares.
        updates: how many updates are in the sums.
    """

    indices: Tensor
    total: Tensor
    total_squared: Tensor
    updates: int = 0

    @property
    def mean(self) -> Tensor:
        """[c] mean gradient of an update."""
        return self.total / max(1, self.updates)

    @property
    def mean_squared(self) -> Tensor:
        """[c] mean of an update's squared gradient."""
        return self.total_squared / max(1, self.updates)


class GradientTap:
    """Watches the gradient of one tuned tensor through one window (`core.observer.GradientObserver`).

    The first backward pass hands over the whole gradient, of which the candidates are the largest entries; every later
    one is sampled at the watched positions alone. What the micro-batches of one update add up to is kept apart until
    `end_update`, so that an update that is skipped (a loss scaler that met an overflow) leaves no trace.

    Args:
        delta: the adapter's delta on the tensor.
        num_candidates: c, how many positions to nominate.
        estimate: sums to go on with, of a window that was interrupted.
    """

    def __init__(self, delta: AdapterDelta, num_candidates: int, estimate: Estimate | None = None) -> None:
        self._delta = delta
        self._num_candidates = min(num_candidates, delta.numel)
        self.estimate = estimate
        # Sum over the micro-batches of the update that is under way, as the backward passes gave them.
        self._current: Tensor | None = None

    def __deepcopy__(self, memo: object) -> None:
        # A copied model is not the one that this window belongs to.
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def wanted(self) -> Tensor | None:
        """The watched positions; None before they are chosen."""
        return None if self.estimate is None else self.estimate.indices

    def receive(self, gradient: Tensor) -> None:
        """Add one micro-batch's gradient, choosing the candidates if it is the first of the window."""
        if self.estimate is None:
            gradient = mean_over_ranks(gradient)
            if not bool(torch.isfinite(gradient).all()):
                return  # an overflow under a loss scaler, whose update will be skipped
            self._nominate(gradient)
            gradient = gradient[self.wanted().long()]
        if self._current is None or self._begins_update():
            self._current = torch.zeros_like(self.estimate.total)
        self._current += gradient

    def _nominate(self, gradient: Tensor) -> None:
        size = gradient.abs()
        active = self._delta.indices
        probes = active[size[active.long()].topk(min(NUM_PROBES, active.numel())).indices].sort().values
        indices = union([top_k(size, self._num_candidates, name="the gradient"), probes])
        zeros = torch.zeros(indices.numel(), dtype=torch.float32, device=gradient.device)
        self.estimate = Estimate(indices, zeros, zeros.clone())

    def _begins_update(self) -> bool:
        # A skipped update ends in zero_grad without a step; within one, earlier micro-batches have left a gradient.
        left = self._delta.values.grad
        return left is None or not bool(left.any())

    def scale_terms(self) -> tuple[float, float]:
        """<g, r> and <r, r> over the probes: the gradient g that the optimizer sees, and r that the backwards gave.

        The ratio of their sums over all tensors is the factor of clipping and unscaling.
        """
        if self._current is None or self._delta.values.grad is None:
            return 0.0, 0.0
        where, is_active = positions(self._delta.indices, self.estimate.indices)
        seen = self._delta.values.grad[where[is_active]].double()
        given = mean_over_ranks(self._current)[is_active].double()
        return float(seen @ given), float(given @ given)

    def end_update(self, scale: float) -> None:
        """Count the update that the optimizer has just made, whose gradient it saw multiplied by `scale`."""
        if self._current is None:
            return
        gradient = mean_over_ranks(self._current) * scale
        self.estimate.total += gradient
        self.estimate.total_squared += gradient.square()
        self.estimate.updates += 1
        self._current = None

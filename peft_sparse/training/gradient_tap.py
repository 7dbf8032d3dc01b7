"""SpIEL-AG's gradient estimation: nominate growth candidates once, then average their gradients over a window."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.indices import positions, union
from ..core.sharded import is_sharded, whole
from ..selection.clarity import count_uncertain
from ..selection.rows import best_rows, in_whole, rows_of
from ..selection.top_k import top_k
from ..tuners.sparse_ft.adapter_delta import AdapterDelta
from .distributed import means_over_ranks

# Active weights that are watched along with the candidates. The gradient that the optimizer sees is known for them, so
# they tell by how much clipping and loss scaling changed it.
NUM_PROBES = 16


@dataclass
class Estimate:
    """Running sums over the updates of a window.

    Attributes:
        indices: [c] watched positions, sorted and unique: candidates, and a few active weights.
        nominated: [c] bool, which of them are candidates.
        total: [c] float32, sum of the updates' gradients.
        total_squared: [c] float32, sum of their squares.
        updates: how many updates are in the sums.
    """

    indices: Tensor
    nominated: Tensor
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

    Of several processes each sees the gradient of its own share of the batch. The whole gradient is averaged over them
    while it exists, so that all nominate what one process would that had the joined batch; the sums at the watched
    positions are averaged once an update.

    Args:
        name: of the tuned tensor.
        delta: the adapter's delta on the tensor.
        num_candidates: c, how many positions to nominate.
        estimate: sums to go on with, of a window that was interrupted.
        num_rows: candidates lie in so many rows at most, among them those of the support; None: anywhere.
        rows_anew: the support's own rows do not count, for all of it is about to be replaced.
    """

    def __init__(
        self,
        name: str,
        delta: AdapterDelta,
        *,
        num_candidates: int,
        estimate: Estimate | None = None,
        num_rows: int | None = None,
        rows_anew: bool = False,
    ) -> None:
        self._name = name
        self._delta = delta
        self._num_rows = num_rows
        self._rows_anew = rows_anew
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
        """Add one micro-batch's gradient, choosing the candidates if it is the first of the window.

        Raises:
            SelectionError: the processes are in different layers, or a different part of the training.
        """
        if self.estimate is None:
            (mean,) = means_over_ranks([gradient], what=self._name)
            if not bool(torch.isfinite(mean).all()):
                return  # an overflow under a loss scaler, whose update will be skipped
            self.estimate = self._nominate(mean)
            gradient = gradient[self.estimate.indices.long()]
        if self._current is None or self._begins_update(self._current):
            self._current = torch.zeros_like(self.estimate.total)
        self._current += gradient

    def _nominate(self, gradient: Tensor) -> Estimate:
        size = gradient.abs()
        active = self._delta.indices
        probes = active[size[active.long()].topk(min(NUM_PROBES, active.numel())).indices].sort().values
        nominees = self._largest(size)
        indices = union([nominees, probes])
        zeros = torch.zeros(indices.numel(), dtype=torch.float32, device=gradient.device)
        return Estimate(indices, positions(nominees, indices)[1], zeros, zeros.clone())

    def _largest(self, size: Tensor) -> Tensor:
        """Positions of the largest entries, in the rows that may be used."""
        if self._num_rows is None:
            return top_k(size, self._num_candidates, name="the gradient")
        shape = self._delta.shape
        by_row = size.view(shape[0], -1)
        kept = None if self._rows_anew else rows_of(self._delta.indices, shape)
        rows = best_rows(by_row, self._num_rows, name="the gradient", kept=kept)
        inside = by_row[rows]
        return in_whole(top_k(inside, min(self._num_candidates, inside.numel()), name="the gradient"), rows, shape)

    def _begins_update(self, current: Tensor) -> bool:
        """Whether the update that `current` belongs to was skipped: it ended in zero_grad without a step."""
        held = self._delta.held_values
        if is_sharded(held):
            # FSDP2 keeps what it has accumulated where nobody sees it, so only an overflow tells.
            return not bool(torch.isfinite(current).all())
        if held.grad is None:
            return True
        # Gradients that were set to zero; those that are zero say nothing: a batch may miss every tuned row.
        _, is_active = positions(self._delta.indices, self.estimate.indices)
        return not bool(held.grad.any()) and bool(current[is_active].any())

    def uncertain(self, num_replaced: int) -> tuple[int, int]:
        """How many candidates lie too near the cut to be sure of their side, and how many are to be grown.

        Args:
            num_replaced: how many weights the reselection drops.
        """
        if self.estimate is None:
            return 0, 0
        # What is tuned already is no candidate to be grown, whatever its gradient.
        _, is_active = positions(self._delta.indices, self.estimate.indices)
        free = self.estimate.nominated & ~is_active
        num_grown = min(num_replaced, int(free.sum()))
        mean, mean_squared = self.estimate.mean[free], self.estimate.mean_squared[free]
        return count_uncertain(mean, mean_squared, samples=self.estimate.updates, num_grown=num_grown), num_grown

    def take(self) -> Tensor | None:
        """[c] what the backward passes of an update gave, if there were any; the next update begins."""
        current, self._current = self._current, None
        return current

    def scale_terms(self, given: Tensor) -> tuple[float, float]:
        """<g, r> and <r, r> over the probes: the gradient g that the optimizer sees, and r that the backwards gave.

        The ratio of their sums over all tensors is the factor of clipping and unscaling.

        Args:
            given: [c] what the backward passes gave, over all processes.
        """
        gradient = self._delta.held_values.grad
        if gradient is None:
            return 0.0, 0.0
        where, is_active = positions(self._delta.indices, self.estimate.indices)
        seen = whole(gradient).to(given.device)[where[is_active]].double()
        probes = given[is_active].double()
        return float(seen @ probes), float(probes @ probes)


def end_update(taps: Iterable[GradientTap], *, what: str) -> None:
    """Count the update that an optimizer has just made, in all watched tensors of an adapter.

    Args:
        taps: the same on every process, and in the same order.
        what: the update's name, the same on every process.

    Raises:
        SelectionError: the processes did not make the same update.
    """
    taps = [tap for tap in taps if tap.estimate is not None]
    if not taps:
        return
    taken = [tap.take() for tap in taps]
    sums = [torch.zeros_like(tap.estimate.total) if t is None else t for tap, t in zip(taps, taken, strict=True)]
    was_seen = torch.tensor([float(t is not None) for t in taken], device=sums[0].device)
    *sums, was_seen = means_over_ranks([*sums, was_seen], what=what)
    seen = [(tap, given) for tap, given, share in zip(taps, sums, was_seen.tolist(), strict=True) if share]
    terms = [tap.scale_terms(given) for tap, given in seen]
    norm = sum(squared for _, squared in terms)
    # What clipping and unscaling made of the gradients; 1 where no watched weight had any.
    scale = sum(product for product, _ in terms) / norm if norm else 1.0
    for tap, given in seen:
        gradient = given * scale
        tap.estimate.total += gradient
        tap.estimate.total_squared += gradient.square()
        tap.estimate.updates += 1

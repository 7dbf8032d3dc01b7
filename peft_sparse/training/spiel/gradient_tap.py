"""SpIEL-AG's gradient estimation: nominate growth candidates once, then average their gradients over a window."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ...core.indices import positions
from ...core.observer import current_pass, is_accumulated
from ...core.sharded import is_sharded, whole
from ...errors import SelectionError
from ...selection.replacement import count_uncertain
from ...selection.rows import best_rows, in_whole, rows_of
from ...selection.top_k import top_k
from ...tuners.sparse_ft.layers.delta import AdapterDelta
from ..distributed import means_over_ranks
from .estimate import Estimate, zero_estimate

# Held while a tap takes a gradient: the replicas of `nn.DataParallel` run their backward passes side by side.
_receiving = threading.Lock()

# Active weights that are watched along with the candidates. The gradient that the optimizer sees is known for them, so
# they tell by how much clipping and loss scaling changed it.
NUM_PROBES = 16
# Positions that are tracked while candidates are nominated over several updates, per candidate.
TRACKED = 2


class GradientTap:
    """Watches the gradient of one tuned tensor through one window (`core.observer.GradientObserver`).

    The first backward pass hands over the whole gradient, of which the candidates are the largest entries; every later
    one is sampled at the watched positions alone. With `nomination_updates` = n the backward passes of the first n
    updates all hand over the whole gradient: of each, and of the sums so far, the `TRACKED` * c positions that are
    largest together are kept, and the c largest of those are the candidates when the n updates are over. So the sums
    are those of the updates' gradients but for what a position had before it came in, which was less than what was kept
    then; and memory stays linear in c. What the micro-batches of one update add up to is kept apart until
    `end_update`, so that an update that is skipped (a loss scaler that met an overflow) leaves no trace.

    A layer that is used several times in a pass shows the gradient of each use; they are added up before anything is
    made of them. When torch has accumulated the values' own gradient there are no more uses to come.

    Of several processes each sees the gradient of its own share of the batch. The whole gradient is averaged over them
    while it exists, so that all nominate what one process would that had the joined batch; the sums at the watched
    positions are averaged once an update.

    Args:
        name: of the tuned tensor.
        delta: the adapter's delta on the tensor.
        num_candidates: c, how many positions to nominate.
        nomination_updates: n >= 0, over how many updates; 0 for the first backward pass alone.
        estimate: sums to go on with, of a window that was interrupted.
        num_rows: candidates lie in so many rows at most, among them those of the support; None: anywhere.
        weigh: gives [numel] float32, what sizes of gradients are multiplied by before they are ranked; None for 1.
        rows_anew: the support's own rows do not count, for all of it is about to be replaced.

    Attributes:
        estimate: the sums so far; None before the candidates are nominated.
        met_infinity: whether a gradient was left out because it was not finite.
    """

    def __init__(
        self,
        name: str,
        delta: AdapterDelta,
        *,
        num_candidates: int,
        nomination_updates: int = 0,
        estimate: Estimate | None = None,
        num_rows: int | None = None,
        rows_anew: bool = False,
        weigh: Callable[[], Tensor] | None = None,
    ) -> None:
        self._name = name
        self._weigh = weigh
        self._delta = delta
        self._num_rows = num_rows
        self._rows_anew = rows_anew
        self._num_candidates = min(num_candidates, delta.numel)
        self._nomination_updates = nomination_updates
        self.estimate = estimate
        self.met_infinity = False
        # Sum over the micro-batches of the update that is under way, as the backward passes gave them.
        self._current: Tensor | None = None
        # What the pass that runs gave so far, and that pass.
        self._uses: Tensor | None = None
        self._pass = -1
        self._handle: RemovableHandle | None = None
        # Watched active weights, while positions come and go.
        self._probes: Tensor | None = None
        # What `_active_watched` found for which positions and support.
        self._known_active: tuple[Tensor, int, Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy begins between two updates.
        return {
            **vars(self),
            "_current": None,
            "_uses": None,
            "_pass": -1,
            "_handle": None,
            "_probes": None,
            "_known_active": None,
        }

    @property
    def is_nominating(self) -> bool:
        """Whether the candidates are still being chosen."""
        return self.estimate is None or self.estimate.updates < self._nomination_updates

    def wanted(self) -> Tensor | None:
        """The watched positions; None before they are chosen."""
        return None if self.is_nominating or self.estimate is None else self.estimate.indices

    def receive(self, gradient: Tensor) -> None:
        """Add the gradient of one use of the tensor in a backward pass."""
        values = self._delta.values
        if not is_accumulated(values):
            return
        with _receiving:
            if (now := current_pass()) != self._pass:
                self._begin_pass(now)
            gradient = gradient.to(self._delta.indices.device, copy=self._uses is None)
            self._uses = gradient if self._uses is None else self._uses.add_(gradient)
            if self._handle is None and values.is_leaf:
                self._handle = values.register_post_accumulate_grad_hook(self._end_pass)

    def _begin_pass(self, number: int) -> None:
        is_new = self._begins_update()
        if is_new:
            self._uses = self._current = None
        else:
            # Gradients that a loop took by `torch.autograd.grad`, and put into `grad` itself.
            self._add_uses()
        self._pass = number

    def _end_pass(self, _: object = None) -> None:
        self._forget_hook()
        self._add_uses()

    def _forget_hook(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _add_uses(self) -> None:
        """Count what the uses in a pass add up to, choosing the candidates if it is the first pass of the window.

        Raises:
            SelectionError: the processes are in different layers, or at different points of the run.
        """
        gradient, self._uses = self._uses, None
        if gradient is None:
            return
        if self.is_nominating:
            (mean,) = means_over_ranks([gradient], what=self._name)
            if not bool(torch.isfinite(mean).all()):
                self.met_infinity = True
                return  # an overflow under a loss scaler, whose update will be skipped
            if self._nomination_updates:
                self._track(mean)
                return
            self.estimate = self._nominate(mean)
            gradient = gradient[self.estimate.indices.long()]
        self._current = gradient if self._current is None else self._current.add_(gradient)

    def _nominate(self, gradient: Tensor) -> Estimate:
        size = gradient.abs()
        return zero_estimate(self._largest(self._weighed(size), self._num_candidates), self._choose_probes(size))

    def _weighed(self, size: Tensor, where: Tensor | None = None) -> Tensor:
        """Sizes of gradients, of the whole tensor or at some positions, as they are ranked."""
        if self._weigh is None:
            return size
        factors = self._weigh().to(size.device)
        return size * (factors if where is None else factors[where.long()])

    def scores(self, *, squared: bool = False) -> Tensor:
        """[n] what the candidates are ranked by: the size of their mean gradient, or the mean of their squared ones.

        Args:
            squared: the latter.
        """
        estimate = self.estimate
        assert estimate is not None
        size = estimate.mean_squared if squared else estimate.mean.abs()
        return self._weighed(size[estimate.nominated], estimate.indices[estimate.nominated])

    def _choose_probes(self, size: Tensor) -> Tensor:
        active = self._delta.indices
        return active[size[active.long()].topk(min(NUM_PROBES, active.numel())).indices].sort().values

    def _track(self, gradient: Tensor) -> None:
        """Add a whole gradient to the sums, and keep the positions that are largest with it in them."""
        old, current = self.estimate, self._current
        total = gradient.clone()
        if old is not None:
            # The sums are of gradients as the optimizer saw them, and this one has yet to be clipped.
            before = old.total / old.scale
            total[old.indices.long()] += before if current is None else before + current
        size = total.abs()
        if current is None or self._probes is None:
            # Chosen with an update's first pass, so that they see all of it.
            self._probes = self._choose_probes(size)
        new = zero_estimate(
            self._largest(self._weighed(size), min(TRACKED * self._num_candidates, size.numel())), self._probes
        )
        self._current = gradient[new.indices.long()]
        if old is not None:
            where, found = positions(old.indices, new.indices)
            kept = where[found]
            new.total[found], new.total_squared[found] = old.total[kept], old.total_squared[kept]
            new.updates, new.scale = old.updates, old.scale
            if current is not None:
                self._current[found] += current[kept]
        self.estimate = new

    def count(self, given: Tensor, scale: float) -> None:
        """Add the gradient of an update that was made to the sums.

        Args:
            given: [c] at the watched positions, as the backward passes gave it.
            scale: what clipping and unscaling made of it.
        """
        estimate = self.estimate
        assert estimate is not None
        gradient = given * scale
        square = gradient.square()
        estimate.scale = scale or estimate.scale
        if self.is_nominating and estimate.updates:
            # Of a position that has just come in, earlier updates are taken to have been as large as this one, so that
            # its mean square, by which its steps will be divided, does not come out too small.
            square = torch.where(estimate.total_squared == 0, square * (estimate.updates + 1), square)
        estimate.total += gradient
        estimate.total_squared += square
        nominated, estimate.updates = self.is_nominating, estimate.updates + 1
        if nominated and self._nomination_updates and not self.is_nominating:
            self._settle(estimate)

    def _settle(self, tracked: Estimate) -> None:
        """End the nomination: the largest sums are the candidates."""
        among = tracked.nominated.nonzero().squeeze(1)
        size = self._weighed(tracked.total[among].abs(), tracked.indices[among])
        best = top_k(size, min(self._num_candidates, among.numel()), name="the gradient").long()
        probes = tracked.indices[~tracked.nominated] if self._probes is None else self._probes
        new = zero_estimate(tracked.indices[among[best]], probes)
        where, _ = positions(tracked.indices, new.indices)
        new.total, new.total_squared = tracked.total[where], tracked.total_squared[where]
        new.updates, new.scale = tracked.updates, tracked.scale
        self.estimate, self._probes = new, None

    def _largest(self, size: Tensor, num: int) -> Tensor:
        """Positions of the `num` largest entries, in the rows that may be used."""
        if self._num_rows is None:
            return top_k(size, num, name="the gradient")
        shape = self._delta.shape
        by_row = size.view(shape[0], -1)
        kept = None if self._rows_anew else rows_of(self._delta.indices, shape)
        rows = best_rows(by_row, self._num_rows, name="the gradient", kept=kept)
        inside = by_row[rows]
        return in_whole(top_k(inside, min(num, inside.numel()), name="the gradient"), rows, shape)

    def _begins_update(self) -> bool:
        """Whether the update that the sums so far belong to was skipped: it ended in zero_grad without a step."""
        held, current = self._delta.held_values, self._current
        if current is not None and is_sharded(held):
            # FSDP2 keeps what it has accumulated where nobody sees it, so only an overflow tells.
            return not bool(torch.isfinite(current).all())
        if held.grad is None:
            return True
        if current is None or self.estimate is None:
            return False
        # Gradients that were set to zero; those that are zero say nothing: a batch may miss every tuned row.
        return not bool(held.grad.any()) and bool(current[self._active_watched()[0]].any())

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
        self._end_pass()
        current, self._current = self._current, None
        return current

    def check_finite(self, given: Tensor, *, what: str) -> bool:
        """Whether what an update gave can be part of an estimate.

        A weight that is not tuned may overflow under a loss scaler, which looks at tuned weights alone and makes the
        update. Such an update is left out.

        Raises:
            SelectionError: a tuned weight was updated with such a gradient.
        """
        if bool(torch.isfinite(given).all()):
            return True
        if not bool(torch.isfinite(given[self._active_watched()[0]]).all()):
            raise not_finite(self._name, what)
        self.met_infinity = True
        return False

    def _active_watched(self) -> tuple[Tensor, Tensor]:
        """Which of the watched positions are tuned, and where they are among the tuned ones: [n] int64 each.

        Cost: a search for each watched position, once for these and this support.
        """
        indices, version = self.estimate.indices, self._delta.support_version
        known = self._known_active
        if known is None or known[0] is not indices or known[1] != version:
            where, is_active = positions(self._delta.indices, indices)
            watched = is_active.nonzero().squeeze(1)
            known = self._known_active = indices, version, watched, where[watched]
        return known[2:]

    def scale_terms(self, given: Tensor) -> tuple[float, float]:
        """<g, r> and <r, r> over the probes: the gradient g that the optimizer sees, and r that the backwards gave.

        The ratio of their sums over all tensors is the factor of clipping and unscaling.

        Args:
            given: [c] what the backward passes gave, over all processes.
        """
        gradient = self._delta.held_values.grad
        if gradient is None:
            return 0.0, 0.0
        watched, active = self._active_watched()
        if self._probes is not None:
            # What came in with a later micro-batch has not seen all of the update.
            is_probe = positions(self._probes, self.estimate.indices[watched])[1]
            watched, active = watched[is_probe], active[is_probe]
        seen = whole(gradient).to(given.device)[active].double()
        probes = given[watched].double()
        return float(seen @ probes), float(probes @ probes)


def not_finite(name: str, what: str) -> SelectionError:
    """The error for an update that was made with NaN or infinite gradients.

    Args:
        name: of the tensor.
        what: the update's name.
    """
    return SelectionError(
        f"{what} was made with a gradient of {name} that holds NaN or infinity, so its weights are lost and SpIEL "
        "cannot rank others. Go back to a checkpoint. Look at the loss and the batch first; then lower the learning "
        "rate, clip gradients, or train in bfloat16 (float16 needs a GradScaler, which skips such updates)."
    )


def end_update(taps: Iterable[GradientTap], *, what: str) -> None:
    """Count the update that an optimizer has just made, in all watched tensors of an adapter.

    Args:
        taps: the same on every process, and in the same order.
        what: the update's name, the same on every process.

    Raises:
        SelectionError: the processes did not make the same update, or it was made with gradients that are not finite.
    """
    taps = list(taps)
    taken = {id(tap): tap.take() for tap in taps}
    taps = [tap for tap in taps if tap.estimate is not None]
    if not taps:
        return
    given = [taken[id(tap)] for tap in taps]
    sums = [torch.zeros_like(tap.estimate.total) if g is None else g for tap, g in zip(taps, given, strict=True)]
    was_seen = torch.tensor([float(g is not None) for g in given], device=sums[0].device)
    *sums, was_seen = means_over_ranks([*sums, was_seen], what=what)
    seen = [(tap, total) for tap, total, share in zip(taps, sums, was_seen.tolist(), strict=True) if share]
    finite = [(tap, total) for tap, total in seen if tap.check_finite(total, what=what)]
    terms = [tap.scale_terms(total) for tap, total in finite]
    norm = sum(squared for _, squared in terms)
    # What clipping and unscaling made of the gradients; 1 where no watched weight had any.
    scale = sum(product for product, _ in terms) / norm if norm else 1.0
    for tap, total in finite:
        tap.count(total, scale)

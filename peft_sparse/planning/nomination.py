"""What nominating SpIEL-AG's growth candidates takes in a dry run: as much as the real one, without its choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from ..selection.criteria import CRITERIA, WEIGHT, Criterion, GradientMeans
from ..tuners.sparse_ft.configs.spiel import SpielAGConfig
from ..tuners.sparse_ft.layers.delta import AdapterDelta

# What a window keeps of a growth candidate: whether it was nominated, and three sums; its index comes on top.
CANDIDATE_BYTES = 1 + 3 * 4


class _Nominator:
    """Watches a gradient as a nominating micro-batch of SpIEL-AG's window does: all of it, to choose candidates.

    Args:
        num_candidates: how many.
        tracks: whether several updates nominate, so that it is added to the sums so far.
        weigh: gives what sizes are multiplied by, for each weight; None for 1.
    """

    def __init__(self, num_candidates: int, *, tracks: bool, weigh: Callable[[], Tensor] | None) -> None:
        self._num_candidates, self._tracks, self._weigh = num_candidates, tracks, weigh
        self._kept: list[Tensor] = []

    def wanted(self) -> Tensor | None:
        return None

    def receive(self, gradient: Tensor) -> None:
        bool(torch.isfinite(gradient).all())
        total = gradient.clone() if self._tracks else gradient
        sizes = total.abs()
        ranked = sizes if self._weigh is None else sizes * self._weigh()
        if not self._tracks:
            del sizes
        # The integer images of a piece of the scores, see `top_k`.
        images = torch.empty(2 * min(ranked.numel(), 2**24), dtype=torch.int32, device=ranked.device)
        del images
        # Where several updates nominate, what is kept of all tensors is there from the second pass on.
        kept = 0 if self._tracks else self._num_candidates * CANDIDATE_BYTES
        self._kept = [gradient.new_empty(kept, dtype=torch.uint8)]


def watch_for_candidates(deltas: Iterable[AdapterDelta], config: SpielAGConfig) -> None:
    """Let all whole gradients be seen as a window of this config sees them."""
    criterion = CRITERIA[config.grow_by]
    for delta in deltas:
        weigh = partial(_factors, criterion, delta.shape) if WEIGHT in criterion.uses else None
        count = round(delta.count * config.candidates_per_weight)
        delta.observer = _Nominator(count, tracks=bool(config.nomination_updates), weigh=weigh)


def _factors(criterion: Criterion, shape: tuple[int, ...]) -> Tensor:
    """As `training.spiel.growth_factors` computes them, of a float32 weight, which is there anyway."""
    weight = torch.empty((), device="meta").expand(shape)
    return criterion.score(weight, GradientMeans(torch.ones(shape, device="meta"), None, 1)).float().reshape(-1)

"""What nominating SpIEL-AG's growth candidates takes in a dry run: as much as the real one, without its choice."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..selection.criteria import CRITERIA, WEIGHT
from ..tuners.sparse_ft.configs.spiel import SpielAGConfig
from ..tuners.sparse_ft.layers.delta import AdapterDelta

# What a window keeps of a growth candidate: whether it was nominated, and three sums; its index comes on top.
CANDIDATE_BYTES = 1 + 3 * 4


class _Nominator:
    """Watches a gradient as a nominating micro-batch of SpIEL-AG's window does: all of it, to choose candidates.

    Args:
        num_candidates: how many.
        tracks: whether several updates nominate, so that it is added to the sums so far.
        weighs: whether sizes are multiplied by a factor for each weight.
    """

    def __init__(self, num_candidates: int, *, tracks: bool, weighs: bool) -> None:
        self._num_candidates, self._tracks, self._weighs = num_candidates, tracks, weighs
        self._kept: list[Tensor] = []

    def wanted(self) -> Tensor | None:
        return None

    def receive(self, gradient: Tensor) -> None:
        bool(torch.isfinite(gradient).all())
        total = gradient.clone() if self._tracks else gradient
        sizes = total.abs()
        if self._weighs:
            sizes = sizes * sizes.clone()
        # The integer images of a piece of the scores, see `top_k`.
        images = torch.empty(2 * min(sizes.numel(), 2**24), dtype=torch.int32, device=sizes.device)
        del images
        # Where several updates nominate, what is kept of all tensors is there from the second pass on.
        kept = 0 if self._tracks else self._num_candidates * CANDIDATE_BYTES
        self._kept = [gradient.new_empty(kept, dtype=torch.uint8)]


def watch_for_candidates(deltas: Iterable[AdapterDelta], config: SpielAGConfig) -> None:
    """Let all whole gradients be seen as a window of this config sees them."""
    how = {"tracks": bool(config.nomination_updates), "weighs": WEIGHT in CRITERIA[config.grow_by].uses}
    for delta in deltas:
        delta.observer = _Nominator(round(delta.count * config.candidates_per_weight), **how)

"""The best of several tensors' scores, of which only some are known at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import SelectionError
from .top_k import Best


class Shortlist:
    """A joint top-k over tensors whose scores come part by part: `streamed_top_k` for callers that cannot wait.

    Parts of several groups of tensors come mixed, so that each group has a shortlist that is added to. The result is
    that of `joint_top_k` over all scores at once, ties included, if the tensors come in their order.

    Args:
        k: how many to select in all.
        name: what errors call the group of tensors.
        min_score: scores must exceed this to be eligible; by default all are.

    Cost: that of `streamed_top_k`.
    """

    def __init__(self, k: int, *, name: str, min_score: float | None = None) -> None:
        self._k = k
        self._name = name
        self._min_score = min_score
        self._best = Best(k, min_score)
        self._devices: dict[str, torch.device] = {}
        self._numel = 0

    def add(self, scores: Mapping[str, Tensor]) -> None:
        """Take the scores of further tensors.

        Args:
            scores: name -> scores of any shape and floating dtype, compared as float32. The names are new ones.

        Raises:
            SelectionError: NaN in a tensor, which is named; scores of a tensor that are no floating-point numbers.
        """
        for name, tensor in scores.items():
            self._devices[name] = tensor.device
            self._numel += tensor.numel()
            self._best.add(name, tensor)

    def select(self) -> dict[str, Tensor]:
        """The k best of all that was added: name -> positions as `joint_top_k` gives them.

        Raises:
            SelectionError: fewer than k scores are eligible.
        """
        self._best.drop_all_but_k()
        found = sum(positions.numel() for positions in self._best.positions.values())
        if found < self._k:
            why = f"which holds {self._numel}"
            if self._min_score is not None:
                why = (
                    f"but only {found} of {self._numel} scored above {self._min_score}: the others had no gradient. "
                    "Take more batches, or ask for a lower density"
                )
            raise SelectionError(f"{self._k} weights are asked from {self._name}, {why}")
        return {name: positions.to(self._devices[name]) for name, positions in self._best.positions.items()}

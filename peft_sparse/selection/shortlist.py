"""The best of several tensors' scores, of which only some are known at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.indices import index_dtype
from ..errors import SelectionError
from .saliency import Computed
from .top_k import joint_top_k


class Shortlist:
    """A joint top-k over tensors whose scores come one part after the other.

    What is not among the k best of the parts so far cannot be among the k best of all, so no more than k positions and
    scores are kept. The result is that of `joint_top_k` over all scores at once, ties included, provided that the parts
    come in the order of the tensors.

    Args:
        k: how many to select in all.
        name: what errors call the group of tensors.
        min_score: scores must exceed this to be eligible; by default all are.

    Cost: k float32 scores and positions, beside those of the part that is being added.
    """

    def __init__(self, k: int, *, name: str, min_score: float | None = None) -> None:
        self._k = k
        self._name = name
        self._min_score = min_score
        self._positions: dict[str, Tensor] = {}
        self._scores: dict[str, Tensor] = {}
        self._numel = self._num_eligible = 0

    def add(self, scores: Mapping[str, Tensor]) -> None:
        """Take the scores of further tensors.

        Args:
            scores: name -> scores of any shape and floating dtype, compared as float32. The names are new ones.

        Raises:
            SelectionError: NaN in a tensor, which is named; scores of a tensor that are no floating-point numbers.
        """
        together = {**self._scores, **{name: tensor.detach().reshape(-1) for name, tensor in scores.items()}}
        k = min(self._k, sum(tensor.numel() for tensor in together.values()))
        # Not as a dictionary: `joint_top_k` would sort few scores together, and these may lie on several devices.
        best = joint_top_k(Computed(list(together), together.__getitem__), k)
        for name, tensor in scores.items():
            self._numel += tensor.numel()
            self._num_eligible += self._count_eligible(tensor)
            self._positions[name] = best[name].to(index_dtype(tensor.numel()))
        for name in self._scores:
            self._positions[name] = self._positions[name][best[name].long()]
        self._scores = {name: tensor[best[name].long()].to(torch.float32) for name, tensor in together.items()}

    def select(self) -> dict[str, Tensor]:
        """The k best of all that was added: name -> positions as `joint_top_k` gives them.

        Raises:
            SelectionError: fewer than k scores are eligible.
        """
        if self._num_eligible < self._k:
            raise SelectionError(
                f"{self._k} weights are asked from {self._name}, but only {self._num_eligible} of {self._numel} scored "
                f"above {self._min_score}: the others had no gradient. Take more batches, or ask for a lower density"
                if self._min_score is not None
                else f"{self._k} weights are asked from {self._name}, which holds {self._numel}"
            )
        return dict(self._positions)

    def _count_eligible(self, scores: Tensor) -> int:
        if self._min_score is None:
            return scores.numel()
        return int((scores.detach().to(torch.float32) > self._min_score).sum())

"""Supports that keep to a share of the rows of each tensor, so that a weight gradient needs those rows alone.

A row is what one index of the first dimension names: an output of a linear layer (an input of transformers' Conv1D), a
token of an embedding, an output channel of a convolution. Vectors have no rows and are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor, prod

import torch
from torch import Tensor

from ..checks import as_decimal, is_number
from ..core.indices import index_dtype
from ..errors import ConfigError
from .budget import Group
from .random import random_indices
from .top_k import top_k


def check_support_rows(share: object) -> None:
    """Check the share on its own.

    Raises:
        ConfigError: neither None nor a number in (0, 1].
    """
    if share is None:
        return
    if not is_number(share) or not 0 < share <= 1:
        raise ConfigError(
            f"support_rows must be a share of the rows of each tensor in (0, 1], or None for all, got {share!r}."
        )


def num_rows(share: float | None, shape: Sequence[int]) -> int | None:
    """R, in how many rows of a tensor weights may lie: the share rounded down, and at least one; None if anywhere.

    Args:
        share: in (0, 1], taken as the decimal number that it prints as; None for no limit.
        shape: of the tensor.
    """
    if share is None or len(shape) < 2 or prod(shape) == 0:
        return None
    return max(1, floor(as_decimal(share) * shape[0]))


def room(share: float | None, shape: Sequence[int]) -> int:
    """How many weights of a tensor fit into as many rows as it may use: all of them if it may use all."""
    rows = num_rows(share, shape)
    return prod(shape) if rows is None else rows * (prod(shape) // shape[0])


def check_room(groups: Sequence[Group], shapes: Mapping[str, Sequence[int]], share: float | None) -> None:
    """Check that what each group asks for fits into the rows that its tensors may use.

    Raises:
        ConfigError: it does not.
    """
    if share is None:
        return
    for group in groups:
        held = sum(room(share, shapes[name]) for name in group.members)
        if group.count > held:
            raise ConfigError(
                f"support_rows={share:g} leaves room for {held} weights in {group.name}, but {group.count} are asked "
                "from it. Give a larger share of the rows, or ask for fewer weights."
            )


def random_in_rows(shape: Sequence[int], k: int, *, share: float | None, seed: int, name: str) -> Tensor:
    """Draw k positions of a tensor: its rows uniformly first, then positions in them.

    Args:
        shape: of the tensor.
        k: how many, 0 <= k <= `room`.
        share: of the rows.
        seed, name: as in `random_indices`, of whose draws these are.

    Returns:
        [k] flat positions on the CPU, ascending, in the dtype of `index_dtype`.
    """
    rows = num_rows(share, shape)
    if rows is None or k > room(share, shape):
        # More than fit: an adapter out of a file, whose support follows.
        return random_indices(prod(shape), k, seed=seed, name=name)
    chosen = random_indices(shape[0], rows, seed=seed, name=f"rows of {name}")
    width = prod(shape) // shape[0]
    return in_whole(random_indices(rows * width, k, seed=seed, name=name), chosen, shape)


def best_rows(scores: Tensor, num: int, *, name: str, kept: Tensor | None = None) -> Tensor:
    """The rows with the largest sums of scores.

    Args:
        scores: [O, ...] floating point; larger is better.
        num: how many rows, 0 <= num <= O.
        name: what errors call the tensor.
        kept: [n] sorted rows that are taken whatever their scores; more than `num` of them stay all.

    Returns:
        [num] int64 row numbers, ascending. Of equal sums the lowest row is taken.

    Raises:
        SelectionError: NaN in the scores.
    """
    sums = _sums_of_rows(scores.detach().reshape(scores.shape[0], -1))
    if kept is None or kept.numel() == 0:
        return top_k(sums, num, name=name).long()
    if kept.numel() >= num:
        return kept.long()
    others = torch.ones(scores.shape[0], dtype=torch.bool, device=scores.device)
    others[kept.long()] = False
    free = others.nonzero().squeeze(1)
    further = free[top_k(sums[free], num - kept.numel(), name=name).long()]
    return torch.cat([kept.long(), further]).sort().values


def _sums_of_rows(scores: Tensor) -> Tensor:
    """[O] float64."""
    sums = scores.sum(1, dtype=torch.float64)
    if bool(sums.isnan().any()):
        # Infinities of both signs in one row have no sum, and are no error; NaN stays NaN.
        largest = torch.finfo(scores.dtype).max
        sums = scores.clamp(-largest, largest).sum(1, dtype=torch.float64)
    return sums


def rows_of(indices: Tensor, shape: Sequence[int]) -> Tensor:
    """[n] int64 sorted rows that flat positions lie in."""
    return (indices.long() // (prod(shape) // shape[0])).unique_consecutive()


def in_whole(positions: Tensor, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Flat positions in a tensor of positions in some of its rows.

    Args:
        positions: [k] flat, ascending, in the tensor [R, ...] of those rows alone.
        rows: [R] ascending.
        shape: of the whole tensor.

    Returns:
        [k] ascending, in the dtype of `index_dtype`.
    """
    width = prod(shape) // shape[0]
    inside = positions.long()
    return (rows.to(inside.device).long()[inside // width] * width + inside % width).to(index_dtype(prod(shape)))


class RowConfinement:
    """Keeps a selection by scores to the best rows of each tensor.

    Scores go through `confine` before they are ranked, and what was selected through `in_whole` afterwards. Which rows
    are a tensor's best is decided once, when it first comes.

    Args:
        share: of the rows; with None both give back what they are given.
    """

    def __init__(self, share: float | None) -> None:
        self._share = share
        self._rows: dict[str, tuple[Tensor, tuple[int, ...]]] = {}

    def confine(self, name: str, scores: Tensor) -> Tensor:
        """The scores of the tensor's best rows alone.

        Raises:
            SelectionError: NaN in the scores.
        """
        num = num_rows(self._share, scores.shape)
        if num is None:
            return scores
        if name not in self._rows:
            self._rows[name] = best_rows(scores, num, name=name), tuple(scores.shape)
        return scores[self._rows[name][0].to(scores.device)]

    def in_whole(self, selected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{parameter: [k_i] positions in the whole tensors} of what was selected among confined scores."""
        return {n: in_whole(p, *self._rows[n]) if n in self._rows else p for n, p in selected.items()}

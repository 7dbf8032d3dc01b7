"""Drop and grow: which tuned weights make room for which others, and carrying tensors to the new support.

A reselection is computed once per tensor and applied to whatever has one entry per tuned weight (values, optimizer
state, ages) with `Replacement.carry`, so all of them stay aligned, and the support stays sorted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.indices import positions
from ..errors import SelectionError
from .top_k import joint_top_k


@dataclass(frozen=True, eq=False)
class Candidates:
    """Weights that could be grown.

    Attributes:
        indices: [c] flat row-major positions, sorted and unique; may overlap the support.
        scores: [c] float32, larger is better.
    """

    indices: Tensor
    scores: Tensor


@dataclass(frozen=True, eq=False)
class Replacement:
    """One reselection of one tensor: k old weights become k' new ones, of which n are grown.

    Attributes:
        dropped: [d] int64 positions in the old values whose weights leave, ascending.
        grown: [n] int64 positions in the new values whose weights enter, ascending; n = d unless weights move between
            tensors.
        candidates: [n] int64 position of each grown weight among the candidates: `means[candidates]` are its estimates.
        indices: [k'] the new support, sorted and unique, in the dtype of the old one.
        order: [k'] int64: `cat([old values, n fills])[order]` are the new values.
        old_count: k.
    """

    dropped: Tensor
    grown: Tensor
    candidates: Tensor
    indices: Tensor
    order: Tensor
    old_count: int

    @property
    def count(self) -> int:
        """k', the number of tuned weights afterwards."""
        return self.order.numel()

    @property
    def num_dropped(self) -> int:
        """d, how many weights leave."""
        return self.dropped.numel()

    @property
    def num_grown(self) -> int:
        """n, how many weights enter."""
        return self.grown.numel()

    @property
    def new_indices(self) -> Tensor:
        """[n] flat positions of the grown weights, ascending."""
        return self.indices[self.grown]

    def carry(self, values: Tensor, fill: Tensor | float = 0.0) -> Tensor:
        """Bring a tensor with one entry per old weight to the new support.

        Args:
            values: [k] any dtype: the values themselves, moments, ages.
            fill: what grown weights get: a number, or [n] in the order of `grown`.

        Returns:
            [k'] a new tensor in the dtype of `values`.

        Raises:
            ValueError: `values` has not one entry per old weight, or `fill` not one per grown weight.

        Cost: one concatenation and one gather.
        """
        if values.shape != (self.old_count,):
            raise ValueError(f"values must have one entry per old weight ({self.old_count}), got {tuple(values.shape)}")
        if isinstance(fill, Tensor) and fill.dim():
            if fill.shape != self.grown.shape:
                raise ValueError(
                    f"fill must have one entry per grown weight ({self.num_grown}), got {tuple(fill.shape)}"
                )
            filled = fill.to(values)
        else:
            filled = values.new_full((self.num_grown,), float(fill))
        return torch.cat([values.detach(), filled])[self.order.to(values.device)]


def replacement_between(old: Tensor, new: Tensor) -> Replacement:
    """What leads from one support of a tensor to another.

    Args:
        old: [k] sorted and unique.
        new: [k'] likewise, on the same device.
    """
    (_, stays), (_, was_there) = positions(new, old), positions(old, new)
    candidates = Candidates(new, torch.zeros(new.numel(), device=new.device))
    return _assemble(old, (~stays).nonzero().squeeze(1), candidates, (~was_there).nonzero().squeeze(1))


def drop_and_grow(
    indices: Tensor, drop_scores: Tensor, candidates: Candidates, *, num_replaced: int, name: str = "the tensor"
) -> Replacement:
    """Replace the weakest weights of a tensor by the strongest candidates.

    One reselection step. Pure: nothing is modified. A weight that is both among the weakest and among the strongest
    candidates stays as it is, with its value. k never changes: where candidates are too few, fewer weights are dropped.

    Args:
        indices: [k] the support, sorted and unique.
        drop_scores: [k] floating point; the smallest are dropped first (|value|, or its change since the last time).
        candidates: what may be grown; those that are tuned already, and stay, do not count.
        num_replaced: how many weights to drop, 0 <= num_replaced <= k (a count, not a rate).
        name: what errors call the tensor.

    Returns:
        Replacement with num_dropped == num_grown <= num_replaced. Of equal scores the lowest index is dropped first,
        and grown first.

    Raises:
        SelectionError: `num_replaced` outside [0, k], shapes that do not match, or NaN in scores.

    Cost: O(k + c) memory; nothing of the size of the weight.
    Source: Ansell et al. 2024, arXiv:2401.16405; thesis 7.3.1, algorithm 2. The authors' code does not sort the new
    support.
    """
    return redistribute({name: indices}, {name: drop_scores}, {name: candidates}, num_replaced=num_replaced)[name]


def redistribute(
    indices: Mapping[str, Tensor],
    drop_scores: Mapping[str, Tensor],
    candidates: Mapping[str, Candidates],
    *,
    num_replaced: int,
) -> dict[str, Replacement]:
    """Replace the weakest weights of all tensors together by the strongest candidates of all tensors together.

    As `drop_and_grow`, but counts move between tensors: only their sum is kept. Pure.

    Args:
        indices, drop_scores, candidates: as in `drop_and_grow`, for the same names. Scores must be comparable between
            tensors.
        num_replaced: how many weights to drop in all tensors together.

    Returns:
        name -> Replacement, in the order of `indices`; sums of num_dropped and num_grown are equal and <= num_replaced.
        Of equal scores those of the first tensor go first, inside a tensor those of the lowest index.

    Raises:
        SelectionError: as `drop_and_grow`; names that differ.

    Cost: O(k + c) memory over all tensors.
    Source: named as open in thesis 7.6; no published code.
    """
    if not indices.keys() == drop_scores.keys() == candidates.keys():
        raise SelectionError("indices, drop_scores and candidates must have the same names")
    for name in indices:
        _check_shapes(name, indices[name], drop_scores[name], candidates[name])
    total = sum(support.numel() for support in indices.values())
    if not 0 <= num_replaced <= total:
        raise SelectionError(f"num_replaced must be between 0 and the {total} tuned weights, got {num_replaced}")
    weakness = {name: -drop_scores[name] for name in indices}
    drop = _joint_top_k(weakness, num_replaced, " (drop scores)")
    eligible = {name: _eligible(indices[name], drop[name], candidates[name].indices) for name in indices}
    scores = {name: candidates[name].scores[eligible[name]] for name in indices}
    num_grown = min(num_replaced, sum(e.numel() for e in eligible.values()))
    best = _joint_top_k(scores, num_grown, " (candidates)")
    chosen = {name: eligible[name][best[name]] for name in indices}

    leaving: dict[str, Tensor] = {}
    entering: dict[str, Tensor] = {}
    for name in indices:
        # What is dropped and grown in one go keeps its value and its optimizer state.
        where, found = positions(indices[name], candidates[name].indices[chosen[name]])
        entering[name] = chosen[name][~found]
        stays = torch.zeros_like(indices[name], dtype=torch.bool)
        stays[where[found]] = True
        leaving[name] = drop[name][~stays[drop[name]]]
    num_entering = sum(e.numel() for e in entering.values())
    if num_entering < sum(d.numel() for d in leaving.values()):
        weakest = _joint_top_k({name: weakness[name][leaving[name]] for name in indices}, num_entering, "")
        leaving = {name: leaving[name][weakest[name]] for name in indices}
    return {name: _assemble(indices[name], leaving[name], candidates[name], entering[name]) for name in indices}


def _joint_top_k(scores: Mapping[str, Tensor], k: int, what: str) -> dict[str, Tensor]:
    """`joint_top_k` as int64 positions; `what` follows the tensor's name in errors."""
    selected = joint_top_k({name + what: score for name, score in scores.items()}, k)
    return {name: selected[name + what].long() for name in scores}


def _check_shapes(name: str, indices: Tensor, drop_scores: Tensor, candidates: Candidates) -> None:
    if drop_scores.shape != indices.shape:
        raise SelectionError(
            f"drop_scores of {name} must have one entry per tuned weight {tuple(indices.shape)}, "
            f"got {tuple(drop_scores.shape)}"
        )
    if candidates.scores.shape != candidates.indices.shape:
        raise SelectionError(
            f"scores of the candidates of {name} must have one entry per index {tuple(candidates.indices.shape)}, "
            f"got {tuple(candidates.scores.shape)}"
        )


def _eligible(indices: Tensor, drop: Tensor, candidates: Tensor) -> Tensor:
    """Positions of the candidates that are not tuned weights which stay."""
    stays = torch.ones_like(indices, dtype=torch.bool)
    stays[drop] = False
    _, found = positions(indices[stays], candidates)
    return (~found).nonzero().squeeze(1)


def _assemble(indices: Tensor, leaving: Tensor, candidates: Candidates, entering: Tensor) -> Replacement:
    """The new support, and how to reach it from the old one."""
    old_count = indices.numel()
    keep = torch.ones_like(indices, dtype=torch.bool)
    keep[leaving] = False
    kept = keep.nonzero().squeeze(1)
    new_indices = candidates.indices[entering].to(indices.dtype)
    # Both parts are sorted and disjoint, so a sort is a merge.
    merged, by = torch.cat([indices[kept], new_indices]).sort()
    source = torch.cat([kept, torch.arange(old_count, old_count + entering.numel(), device=kept.device)])
    order = source[by]
    return Replacement(
        dropped=leaving,
        grown=(order >= old_count).nonzero().squeeze(1),
        candidates=entering,
        indices=merged,
        order=order,
        old_count=old_count,
    )


def count_uncertain(
    mean: Tensor, mean_squared: Tensor, *, samples: int, num_grown: int, num_deviations: float = 2.0
) -> int:
    """How many candidates could as well be on the other side of the cut.

    A candidate is uncertain if the cut, halfway between the weakest grown and the strongest refused mean magnitude,
    lies within `num_deviations` standard errors of its own.

    Args:
        mean: [c] mean gradient of each candidate.
        mean_squared: [c] mean of its squared gradient.
        samples: gamma >= 2, how many updates both are means over.
        num_grown: how many candidates are grown, 0 <= num_grown <= c; 0 and c leave no cut, and none uncertain.
        num_deviations: half the width of the confidence interval, in standard errors.

    Returns:
        a count in [0, c].

    Raises:
        SelectionError: fewer than two samples, or `num_grown` out of range.

    Source: proposed in thesis 7.6; no published code.
    """
    if samples < 2:
        raise SelectionError(f"samples must be >= 2 for a standard error, got {samples}. Take estimation_steps >= 2")
    if not 0 <= num_grown <= mean.numel():
        raise SelectionError(
            f"num_grown must be between 0 and {mean.numel()}, the number of candidates, got {num_grown}"
        )
    if num_grown in (0, mean.numel()):
        return 0
    size = mean.double().abs()
    ordered = size.sort(descending=True).values
    cut = (ordered[num_grown - 1] + ordered[num_grown]) / 2
    variance = (mean_squared.double() - mean.double().square()).clamp_min(0) * samples / (samples - 1)
    error = (variance / samples).sqrt()
    return int(((size - cut).abs() < num_deviations * error).sum())

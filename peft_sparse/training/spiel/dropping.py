"""What a reselection replaces: weights that are weak by the config's `drop_by`, in every tensor or in all together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ...selection.replacement import Candidates, Replacement, drop_and_grow, redistribute


def drop_scores(values: Tensor, before: Tensor | None) -> Tensor:
    """How much each weight of a tensor counts; the lowest are dropped.

    Args:
        values: [k] the tuned values, whole.
        before: [k] what they were after the last reselection, where `drop_by` asks for that; else None.

    Returns:
        [k] >= 0.

    Source: the sizes of deltas are those of the authors' code, of their changes those of thesis Algorithm 2; see
    `SpielAGConfig`.
    """
    return values.abs() if before is None else (values - before.to(values.device)).abs()


def choose_replacements(
    indices: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    candidates: Mapping[str, Candidates],
    *,
    budget: str,
    num_replaced: Callable[[int], int],
) -> dict[str, Replacement]:
    """What is dropped and grown in the tensors that have candidates.

    Args:
        indices, scores: {parameter name: [k] the tuned positions, and how much each weight counts}.
        candidates: {parameter name: candidates}.
        budget: of the config: with "global" weights move between tensors.
        num_replaced: k -> how many of k weights are to be replaced.
    """
    if budget == "global":
        total = sum(own.numel() for own in indices.values())
        return redistribute(indices, scores, candidates, num_replaced=num_replaced(total))
    return {
        name: drop_and_grow(own, scores[name], candidates[name], num_replaced=num_replaced(own.numel()))
        for name, own in indices.items()
    }

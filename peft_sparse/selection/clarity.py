"""How sure the cut between grown and refused candidates is."""

from __future__ import annotations

from torch import Tensor

from ..errors import SelectionError


def count_uncertain(
    mean: Tensor, mean_squared: Tensor, *, samples: int, num_grown: int, num_deviations: float = 2.0
) -> int:
    """How many candidates could as well stand on the other side of the cut.

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

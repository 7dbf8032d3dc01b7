"""The mathematics of `add_weighted_adapter`: several deltas of one weight become one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from math import isfinite

import torch
from torch import Tensor

from ..checks import check_one_of, is_number
from ..core.backends.native import kernels
from ..core.delta import SparseDelta
from ..core.indices import FEW_SUPPORTS, positions, union
from ..errors import ConfigError
from ..selection.budget import round_density
from ..selection.top_k import top_k

# Columns of the union that are summed at a time, so that the float64 copies stay small.
_CHUNK = 2**20

# Per adapter: delta, density, generator -> the delta whose values count.
Prune = Callable[[SparseDelta, float, torch.Generator | None], SparseDelta]


def keep_largest(delta: SparseDelta, density: float, generator: torch.Generator | None = None) -> SparseDelta:
    """The largest values by magnitude, exactly `round_density(density, count)` of them; ties to the lowest index."""
    kept = top_k(delta.values.abs(), round_density(density, delta.count), name="the values to prune").long()
    return SparseDelta(delta.indices[kept], delta.values[kept], delta.shape)


def drop_random(delta: SparseDelta, density: float, generator: torch.Generator | None = None) -> SparseDelta:
    """Each value with probability `density`, independently. The caller divides by the density."""
    device = generator.device if generator is not None else None
    draws = torch.rand(delta.count, generator=generator, dtype=torch.float64, device=device)
    kept = (draws < density).to(delta.values.device)
    return SparseDelta(delta.indices[kept], delta.values[kept], delta.shape)


@dataclass(frozen=True)
class Combination:
    """What a combination type does.

    Attributes:
        prune: how each adapter is thinned out first, or None.
        rescale: whether values are divided by the density after that, which keeps their expectation.
        elect_sign: whether each position averages the values of the majority's sign, instead of adding all up.
    """

    prune: Prune | None = None
    rescale: bool = False
    elect_sign: bool = False


COMBINATIONS = {
    "linear": Combination(),
    "magnitude_prune": Combination(keep_largest),
    "ties": Combination(keep_largest, elect_sign=True),
    "dare_linear": Combination(drop_random, rescale=True),
    "dare_ties": Combination(drop_random, rescale=True, elect_sign=True),
}
MAJORITY_SIGN_METHODS = ("total", "frequency")


def combine(
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    combination_type: str,
    *,
    density: float | None = None,
    majority_sign_method: str = "total",
    generator: torch.Generator | None = None,
) -> SparseDelta:
    """Combine several deltas of one weight into one.

    Args:
        deltas: one per adapter, at least one, all of the same shape; a delta may be empty.
        weights: a finite factor for each, of any sign.
        combination_type: "linear": sum of weight * delta, on the union of the supports.
            "magnitude_prune": the same after keeping each adapter's largest values.
            "dare_linear": the same after dropping values at random and dividing the others by the density.
            "ties", "dare_ties": after the pruning of "magnitude_prune" or "dare_linear", each position elects a sign
            and takes the mean of weight * value over the adapters whose value has that sign.
        density: share of each adapter's own values to keep, in (0, 1]; for all types but "linear", which takes none.
        majority_sign_method: what elects the sign: "total" (the sum of the values, unweighted) or "frequency" (the
            number of adapters); an even vote is positive.
        generator: source of the random drops; the global one if None. Adapters draw in the order given.

    Returns:
        The combined delta on the union of the supports that pruning leaves (entries that cancel stay, with value 0), in
        the values' common dtype. Sums are taken in float64 and rounded once, in an order that depends on the summands
        alone: a permutation of the adapters changes no bit of it, unless drops are random. One adapter at weight 1.0
        under "linear" comes back bit for bit. The values are a new tensor.

    Raises:
        ConfigError: an argument out of range, or arguments that do not fit each other.

    Cost: O(sum of counts), with float64 copies of at most 2**20 positions at a time; nothing dense.
    Source: PEFT's `merge_utils`, for TIES (Yadav et al. 2023, arXiv:2306.01708) and DARE (Yu et al. 2023,
        arXiv:2311.03099). Differs from PEFT on dense tensors in this: `density` is a share of the values that an
        adapter has, not of the weight's elements (nearly all of which are zero, so that dense pruning would prune
        nothing); the number kept is rounded half up and at least one, not down. Zeros outside a support have no vote
        in either.
    """
    combination = _checked(deltas, weights, combination_type, density, majority_sign_method)
    parts = [(delta, float(weight)) for delta, weight in zip(deltas, weights, strict=True) if delta.count > 0]
    if not parts:
        return deltas[0]
    if combination.prune is not None and density is not None and density < 1:
        parts = [(combination.prune(delta, density, generator), weight) for delta, weight in parts]
    divisor = density if combination.rescale and density is not None else 1.0
    factors = torch.tensor([weight for _, weight in parts], dtype=torch.float64, device=parts[0][0].values.device)
    if not combination.elect_sign and divisor == 1.0 and (merged := _merged(parts)) is not None:
        return merged
    support = union([delta.indices for delta, _ in parts])
    dtype = reduce(torch.promote_types, (delta.values.dtype for delta, _ in parts))
    values = torch.empty(support.numel(), dtype=dtype, device=support.device)
    for start, columns in _columns([delta for delta, _ in parts], support):
        columns /= divisor
        if combination.elect_sign:
            combined = _mean_of_majority(columns, factors, majority_sign_method)
        else:
            combined = _ordered_sum(columns * factors[:, None])
        values[start : start + columns.shape[1]] = combined.to(dtype)
    return SparseDelta(support, values, deltas[0].shape)


def _merged(parts: list[tuple[SparseDelta, float]]) -> SparseDelta | None:
    """`combine` for plain sums of a few float32 deltas in the processor's memory: one pass over sorted lists."""
    supports = [delta.indices.contiguous() for delta, _ in parts]
    values = [delta.values.detach().contiguous() for delta, _ in parts]
    native = kernels(*supports, dtypes=(supports[0].dtype,)) if len(parts) <= FEW_SUPPORTS else None
    if native is None or kernels(*values, dtypes=(torch.float32,)) is None:
        return None
    support, sums = native.merge(supports, values, [weight for _, weight in parts])
    assert sums is not None
    return SparseDelta(support, sums, parts[0][0].shape)


def _columns(deltas: Sequence[SparseDelta], support: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Start and float64 values [adapters, positions] of pieces of the union; zero where an adapter has none."""
    placed = [(positions(support, delta.indices)[0], delta.values.detach()) for delta in deltas]
    for start in range(0, support.numel(), _CHUNK):
        stop = min(start + _CHUNK, support.numel())
        columns = torch.zeros(len(deltas), stop - start, dtype=torch.float64, device=support.device)
        for row, (where, values) in zip(columns, placed, strict=True):
            first, last = torch.searchsorted(where, torch.tensor([start, stop], device=where.device)).tolist()
            row[where[first:last] - start] = values[first:last].double()
        yield start, columns


def _ordered_sum(columns: Tensor) -> Tensor:
    """Sum over the adapters, from the least to the greatest: the same bits whatever order they came in."""
    # Two numbers have the same sum either way round.
    ordered = columns.sort(dim=0).values if columns.shape[0] > 2 else columns
    total = ordered[0].clone()
    for row in ordered[1:]:
        total += row
    return total


def _mean_of_majority(columns: Tensor, factors: Tensor, method: str) -> Tensor:
    """Per position, the mean of factor * value over the adapters whose value has the elected sign."""
    signs = columns.sign()
    votes = _ordered_sum(columns) if method == "total" else signs.sum(dim=0)
    agrees = signs == torch.where(votes >= 0, 1.0, -1.0)
    total = _ordered_sum(columns * factors[:, None] * agrees)
    return total / agrees.sum(dim=0).clamp(min=1)


def _checked(
    deltas: Sequence[SparseDelta],
    weights: Sequence[float],
    combination_type: str,
    density: float | None,
    majority_sign_method: str,
) -> Combination:
    """The combination that the name stands for, if the arguments fit it."""
    check_one_of("combination_type", combination_type, COMBINATIONS)
    combination = COMBINATIONS[combination_type]
    if not deltas:
        raise ConfigError("at least one delta is needed to combine, got none")
    if len(weights) != len(deltas):
        raise ConfigError(f"weights must have one number per adapter, got {len(weights)} for {len(deltas)} adapters")
    if not all(isfinite(weight) for weight in weights):
        raise ConfigError(f"weights must be finite, got {list(weights)}")
    shapes = [tuple(delta.shape) for delta in deltas]
    if len(set(shapes)) > 1:
        raise ConfigError(f"only deltas of one weight can be combined, got the shapes {shapes}")
    check_one_of("majority_sign_method", majority_sign_method, MAJORITY_SIGN_METHODS)
    if combination.prune is None and density is not None:
        pruning = [name for name, other in COMBINATIONS.items() if other.prune is not None]
        raise ConfigError(f"density={density} has no meaning for {combination_type!r}; it belongs to {pruning}")
    if combination.prune is not None and not (is_number(density) and 0 < density <= 1):
        raise ConfigError(f"density must be in (0, 1] for {combination_type!r} (the share to keep), got {density}")
    return combination

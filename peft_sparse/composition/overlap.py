"""How adapters relate before they are added up: overlap, opposite signs, and what cancels, as sums that add up.

Both measures are sums over weights, so that those of two tensors (or groups of tensors) are added with `+`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import sqrt
from operator import add

import torch
from torch import Tensor

from ..core.delta import SparseDelta
from ..core.indices import positions, union
from ..errors import ConfigError

# {name of the parameter in the base model: delta}
Deltas = Mapping[str, SparseDelta]


@dataclass(frozen=True)
class Overlap:
    """What two adapters have in common.

    Attributes:
        counts: how many weights each of the two tunes.
        shared: how many both tune.
        expected: how many both would tune, on average, had each drawn as many weights as it has in every tensor at
            random: the sum of count_a * count_b / numel.
        opposite: how many of the shared weights change in opposite directions (a change of exactly 0 has none).
        dot: scalar product of the two deltas.
        squares: squared norm of each delta.
        tensors: how many tensors both tune.
    """

    counts: tuple[int, int] = (0, 0)
    shared: int = 0
    expected: float = 0.0
    opposite: int = 0
    dot: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)
    tensors: int = 0

    def __add__(self, other: Overlap) -> Overlap:
        """The overlap in two disjoint sets of tensors together."""
        return Overlap(
            (self.counts[0] + other.counts[0], self.counts[1] + other.counts[1]),
            self.shared + other.shared,
            self.expected + other.expected,
            self.opposite + other.opposite,
            self.dot + other.dot,
            (self.squares[0] + other.squares[0], self.squares[1] + other.squares[1]),
            self.tensors + other.tensors,
        )

    @property
    def share(self) -> float | None:
        """|A and B| / min(|A|, |B|), in [0, 1]; None if one of them tunes nothing."""
        return _ratio(self.shared, min(self.counts))

    @property
    def chance(self) -> float | None:
        """The share that chance would give, see `expected`."""
        return _ratio(self.expected, min(self.counts))

    @property
    def jaccard(self) -> float | None:
        """|A and B| / |A or B|, in [0, 1]; None if both tune nothing."""
        return _ratio(self.shared, sum(self.counts) - self.shared)

    @property
    def opposite_share(self) -> float | None:
        """Share of the shared weights that change in opposite directions; None if none is shared."""
        return _ratio(self.opposite, self.shared)

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between the two deltas as vectors of all the model's weights, in [-1, 1]; None if one of
        them is zero."""
        cosine = _ratio(self.dot, sqrt(self.squares[0]) * sqrt(self.squares[1]))
        return None if cosine is None else min(1.0, max(-1.0, cosine))


@dataclass(frozen=True)
class Interference:
    """What happens to the deltas of several adapters when they are added up.

    At each weight let P be the sum of the positive changes and N that of the negative ones, without its sign. The sum
    of the adapters changes the weight by P - N, so min(P, N) of one side is undone by as much of the other.

    Attributes:
        count: weights that at least one adapter tunes.
        shared: weights that at least two tune.
        opposite: weights at which P and N are both positive.
        change: sum of |change| over all weights and adapters, the sum of P + N.
        undone: the part of it that cancels, the sum of 2 min(P, N).
        undone_square: sum of min(P, N)**2.
        sum_square: squared norm of the sum of the deltas.
        squares: squared norm of each delta.
    """

    count: int = 0
    shared: int = 0
    opposite: int = 0
    change: float = 0.0
    undone: float = 0.0
    undone_square: float = 0.0
    sum_square: float = 0.0
    squares: tuple[float, ...] = ()

    def __add__(self, other: Interference) -> Interference:
        """The interference of the same adapters in two disjoint sets of tensors together."""
        return Interference(
            self.count + other.count,
            self.shared + other.shared,
            self.opposite + other.opposite,
            self.change + other.change,
            self.undone + other.undone,
            self.undone_square + other.undone_square,
            self.sum_square + other.sum_square,
            tuple(mine + its for mine, its in zip(self.squares, other.squares, strict=True)),
        )

    @property
    def shared_share(self) -> float | None:
        """Share of the tuned weights that several adapters tune; None if nothing is tuned."""
        return _ratio(self.shared, self.count)

    @property
    def opposite_share(self) -> float | None:
        """Share of the shared weights at which adapters pull in opposite directions; None if none is shared."""
        return _ratio(self.opposite, self.shared)

    @property
    def cancelled(self) -> float | None:
        """Share of all change that cancels, sum of 2 min(P, N) / sum of (P + N): 0 if adapters never pull in opposite
        directions, 1 if their sum changes nothing; None if there is no change."""
        share = _ratio(self.undone, self.change)
        return None if share is None else min(1.0, share)

    @property
    def norm(self) -> float:
        """Norm of the interference: the Euclidean norm of min(P, N) over all weights, in the units of the weights."""
        return sqrt(self.undone_square)

    @property
    def gain(self) -> float | None:
        """Norm of the sum / sqrt(sum of the squared norms). 1 is what adapters without a shared weight have; below 1
        they weaken each other, above 1 (up to the square root of their number) they push the same way."""
        return _ratio(sqrt(self.sum_square), sqrt(sum(self.squares)))


def overlap(first: Deltas, second: Deltas) -> Overlap:
    """The overlap of two adapters.

    Args:
        first: deltas by parameter name.
        second: the same of the other adapter; a parameter that only one of them has counts as untouched by the other.

    Raises:
        ConfigError: a parameter has another shape in the one than in the other.

    Cost: O(k log k) for k weights, a parameter at a time.
    Source: thesis, Fig. 4.4 and E.2 (pairwise overlap in percent; the text names no denominator, ours is the smaller
        adapter, which is theirs where both have the same density).
    """
    # Sorted, so that the sums come out the same to the last bit for a model and for its file.
    names = sorted({*first, *second})
    return reduce(add, (_overlap_in(*_same_shape(name, [first, second])) for name in names), Overlap())


def interference(adapters: Sequence[Deltas], weights: Sequence[float] | None = None) -> Interference:
    """What several adapters undo of each other when they are added up.

    Args:
        adapters: deltas by parameter name, of each adapter.
        weights: the factor of each adapter in the sum, as for `add_weighted_adapter`; 1 each if None.

    Raises:
        ConfigError: a parameter has another shape in one adapter than in another, or not one weight per adapter.

    Cost: O(k log k) for k weights in all; float64 copies of one parameter's values at a time.
    """
    factors = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(adapters):
        raise ConfigError(f"weights must have one number per adapter, got {len(factors)} for {len(adapters)} adapters")
    names = sorted({name for deltas in adapters for name in deltas})
    parts = (_interference_in(_same_shape(name, adapters), factors) for name in names)
    return reduce(add, parts, Interference(squares=(0.0,) * len(adapters)))


def _same_shape(name: str, adapters: Sequence[Deltas]) -> list[SparseDelta]:
    """Each adapter's delta of a parameter, empty where it has none."""
    shapes = dict.fromkeys(tuple(deltas[name].shape) for deltas in adapters if name in deltas)
    if len(shapes) > 1:
        raise ConfigError(
            f"'{name}' has the shapes {list(shapes)} in these adapters: they are made for different base models and "
            "cannot be compared or added up. Give adapters of one base model"
        )
    shape = next(iter(shapes))
    found = [deltas.get(name, SparseDelta.empty(shape)) for deltas in adapters]
    return [SparseDelta(delta.indices.cpu(), delta.values.detach().cpu(), shape) for delta in found]


def _overlap_in(first: SparseDelta, second: SparseDelta) -> Overlap:
    where, found = positions(first.indices, second.indices)
    mine, its = _exact(first.values[where[found]]), _exact(second.values[found])
    return Overlap(
        counts=(first.count, second.count),
        shared=int(found.sum()),
        expected=first.count * second.count / first.numel if first.numel else 0.0,
        opposite=int((mine.sign() * its.sign() < 0).sum()),
        dot=float(mine @ its),
        squares=(_square(_exact(first.values)), _square(_exact(second.values))),
        tensors=int(first.count > 0 and second.count > 0),
    )


def _interference_in(deltas: Sequence[SparseDelta], factors: Sequence[float]) -> Interference:
    support = union([delta.indices for delta in deltas])
    tuned_by = torch.zeros(support.numel(), dtype=torch.int32)
    positive, negative = torch.zeros(2, support.numel(), dtype=torch.float64)
    squares = []
    for delta, factor in zip(deltas, factors, strict=True):
        slots, _ = positions(support, delta.indices)
        values = _exact(delta.values) * factor
        tuned_by[slots] += 1
        positive[slots] += values.clamp(min=0)
        negative[slots] -= values.clamp(max=0)
        squares.append(_square(values))
    undone = torch.minimum(positive, negative)
    return Interference(
        count=support.numel(),
        shared=int((tuned_by > 1).sum()),
        opposite=int((undone > 0).sum()),
        change=float((positive + negative).sum()),
        undone=float(2 * undone.sum()),
        undone_square=_square(undone),
        sum_square=_square(positive - negative),
        squares=tuple(squares),
    )


def _exact(values: Tensor) -> Tensor:
    return values.to(torch.float64)


def _square(values: Tensor) -> float:
    return float(values @ values)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None

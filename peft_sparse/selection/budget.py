"""How many: what a density is a fraction of, and how a total is spread over tensors.

A budget turns a total into groups of tensors with a count each; inside a group the selection is joint. "uniform" makes
a group of each tensor, "global" one group of all, {regex: share} one group for each regex, and the names of
`LAYER_BUDGETS` one for each part of the model's depth. Criteria that rank weights make one joint top-k per group;
criteria that need no scores draw with `draw_counts` how many fall to each tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor, lcm, prod

from ..checks import as_decimal, check_share, check_whole, is_number
from ..errors import ConfigError
from .layer_budgets import LAYER_BUDGETS, Zone, zones_of
from .patterns import check_pattern, search
from .random import bernoulli_count, random_counts

Budget = str | Mapping[str, float]

# The budgets that have a name.
BUDGETS = ("uniform", "global", *LAYER_BUDGETS)
# How far the shares of a budget may sum from 1, for shares such as three times 0.333333.
SHARE_TOLERANCE = Fraction(1, 10**6)


@dataclass(frozen=True)
class Group:
    """Tensors that share a count.

    Attributes:
        name: what errors and reports call it: the parameter, "global", the regex, or the part of the depth.
        members: parameter names, in the order of the model.
        count: how many weights to select in all members together.
    """

    name: str
    members: tuple[str, ...]
    count: int


def round_density(density: float, numel: int) -> int:
    """The number of weights that a density asks for: density * numel, halves rounded up, and at least one.

    Args:
        density: in (0, 1], taken as the decimal number that it prints as (0.35 of 10 is 3.5, which gives 4).
        numel: how many weights it is a share of, >= 0 (0 gives 0).

    Raises:
        ConfigError: `density` outside (0, 1].
    """
    _check_density(density)
    return min(numel, max(1, floor(as_decimal(density) * numel + Fraction(1, 2))))


def check_request(
    *, density: float | None, num_weights: int | None, equivalent_rank: int | None, density_of: str
) -> None:
    """Check a request on its own, before any model is known.

    Raises:
        ConfigError: not exactly one of the three is given, or a value is out of range.
    """
    requests = {"density": density, "num_weights": num_weights, "equivalent_rank": equivalent_rank}
    given = {name: value for name, value in requests.items() if value is not None}
    if len(given) != 1:
        found = " and ".join(f"{name}={value}" for name, value in given.items()) or "none"
        raise ConfigError(f"give exactly one of density, num_weights and equivalent_rank, got {found}")
    if density is not None:
        _check_density(density)
    for name in given.keys() - {"density"}:
        check_whole(name, given[name], way_out="To give a share of the weights use density=...")
    if density_of not in ("targets", "model"):
        raise ConfigError(f"density_of must be 'targets' or 'model', got {density_of!r}")


def check_budget(budget: Budget) -> None:
    """Check a budget on its own, before any model is known.

    Raises:
        ConfigError: an unknown name, an invalid regex, a share outside [0, 1], or shares that do not sum to 1.
    """
    if not isinstance(budget, Mapping):
        if not isinstance(budget, str) or budget not in BUDGETS:
            known = ", ".join(map(repr, BUDGETS))
            raise ConfigError(f"budget must be one of {known} or {{regex: share}}, got {budget!r}")
        return
    for pattern in budget:
        check_pattern("budget group", pattern)
    whole = sum((_checked_share(pattern, share) for pattern, share in budget.items()), Fraction(0))
    if abs(whole - 1) > SHARE_TOLERANCE:
        raise ConfigError(f"the shares of the budget must sum to 1, got {float(whole):.6g} from {dict(budget)}")


def total_from_request(
    *,
    density: float | None = None,
    num_weights: int | None = None,
    equivalent_rank: int | None = None,
    shapes: Mapping[str, tuple[int, ...]],
    density_of: str = "targets",
    model_numel: int | None = None,
    linear_names: Collection[str] = (),
) -> int:
    """Turn a request into the number of weights to tune.

    Args:
        density: share of the weights, rounded as `round_density` says.
        num_weights: the number itself, >= 1.
        equivalent_rank: r >= 1: r * (in + out) for each targeted linear weight, as many as LoRA of rank r trains.
        shapes: parameter name -> shape, of all targeted tensors.
        density_of: "targets" or "model": what `density` is a share of.
        model_numel: number of parameters of the base model; needed for "model".
        linear_names: which of `shapes` are two-dimensional weights of linear layers; needed for `equivalent_rank`.

    Returns:
        The total, 1 <= total <= number of targeted weights.

    Raises:
        ConfigError: not exactly one request, a value out of range, or more weights asked than targeted.
    """
    check_request(density=density, num_weights=num_weights, equivalent_rank=equivalent_rank, density_of=density_of)
    targeted = sum(prod(shape) for shape in shapes.values())
    if targeted == 0:
        raise ConfigError("no weight is targeted, so none can be selected. Check target_modules")
    if density is not None:
        request = f"density={density} of the {density_of}"
        if density_of == "model" and model_numel is None:
            raise ConfigError("density_of='model' needs model_numel, the number of parameters of the base model")
        total = round_density(density, targeted if density_of == "targets" else int(model_numel or 0))
    elif num_weights is not None:
        request = f"num_weights={num_weights}"
        total = num_weights
    else:
        assert equivalent_rank is not None  # `check_request` saw one of the three
        request = f"equivalent_rank={equivalent_rank}"
        total = equivalent_rank * _rank_one_count(shapes, linear_names)
    if total > targeted:
        raise ConfigError(
            f"{request} asks for {total} weights, but the targeted tensors hold {targeted}. "
            "Ask for less, or target more modules"
        )
    return total


def groups_of(budget: Budget, total: int, sizes: Mapping[str, int]) -> list[Group]:
    """Spread a total over groups of tensors.

    Args:
        budget: "uniform" (the same density in every tensor), "global" (one group of all tensors), {regex: share of the
            total}, or one of `LAYER_BUDGETS` (see `zones_of`). A regex is searched for in the parameter's full name; a
            group of share 0 gets no weight.
        total: how many weights, 0 <= total <= sum of the sizes.
        sizes: parameter name -> number of elements.

    Returns:
        Groups whose counts sum to `total` exactly, each at most its members' size. Each count is its exact proportion
        rounded down or up; what rounding leaves goes to the largest remainders, ties to the first.

    Raises:
        ConfigError: an unknown budget; shares outside [0, 1] or that do not sum to 1; a parameter that matches no regex
            or several; a regex that matches no parameter; a group with fewer weights than its share asks for; a model
            of too few layers for one of `LAYER_BUDGETS`.

    Cost: O(tensors * regexes), whatever their sizes.
    """
    targeted = sum(sizes.values())
    if not 0 <= total <= targeted:
        raise ConfigError(f"total must be between 0 and the {targeted} targeted weights, got {total}")
    check_budget(budget)
    if isinstance(budget, Mapping):
        return _share_groups(_zones_by_pattern(budget, sizes), total, sizes)
    if budget in LAYER_BUDGETS:
        return _share_groups(zones_of(budget, sizes), total, sizes)
    if budget == "global":
        return [Group("global", tuple(sizes), total)]
    counts = _apportion(total, list(sizes.values()))
    return [Group(name, (name,), count) for name, count in zip(sizes, counts, strict=True)]


def draw_counts(groups: Sequence[Group], sizes: Mapping[str, int], *, seed: int) -> dict[str, int]:
    """Counts per tensor of a uniformly random joint selection in each group, without drawing the selection itself.

    Args:
        groups: of `groups_of`.
        sizes: parameter name -> number of elements.
        seed: the counts are a function of it and of the groups' names and sizes alone.

    Returns:
        parameter name -> count, in the order of `sizes`: an exact draw from the multivariate hypergeometric
        distribution of each group. A group of one tensor gets its count.

    Cost: O(tensors + sqrt(total)), well under a second for a model with billions of weights.
    """
    counts: dict[str, int] = {}
    for group in groups:
        drawn = random_counts([sizes[name] for name in group.members], group.count, seed=seed, name=group.name)
        counts.update(zip(group.members, drawn, strict=True))
    return {name: counts[name] for name in sizes}


def bernoulli_counts(groups: Sequence[Group], sizes: Mapping[str, int], *, seed: int) -> dict[str, int]:
    """Counts per tensor when every weight is drawn independently, with the probability count / size of its group.

    Args:
        groups: of `groups_of`.
        sizes: parameter name -> number of elements.
        seed: a tensor's count is a function of it, of the probability, and of the tensor's name and size alone.

    Returns:
        parameter name -> count, in the order of `sizes`; they sum to about the groups' counts.
    """
    counts: dict[str, int] = {}
    for group in groups:
        held = sum(sizes[name] for name in group.members)
        for name in group.members:
            probability = group.count / held if held else 0.0
            counts[name] = bernoulli_count(sizes[name], probability, seed=seed, name=name)
    return {name: counts[name] for name in sizes}


def _zones_by_pattern(shares: Mapping[str, float], sizes: Mapping[str, int]) -> list[Zone]:
    """One part of the model for each regex."""
    members = _members_by_pattern(list(shares), sizes)
    return [Zone(pattern, _checked_share(pattern, shares[pattern]), tuple(members[pattern])) for pattern in shares]


def _share_groups(zones: Sequence[Zone], total: int, sizes: Mapping[str, int]) -> list[Group]:
    """One group for each part of the model."""
    groups = []
    scale = lcm(*(zone.share.denominator for zone in zones))
    counts = _apportion(total, [int(zone.share * scale) for zone in zones])
    for zone, count in zip(zones, counts, strict=True):
        held = sum(sizes[name] for name in zone.members)
        if count > held:
            asked = f"its share {float(zone.share):g} of {total} asks for {count}"
            way_out = f"Give it a share of at most {held / total:.4g}, or lower the density"
            raise ConfigError(f"budget group {zone.name!r} holds {held} weights, but {asked}. {way_out}")
        groups.append(Group(zone.name, zone.members, count))
    return groups


def _members_by_pattern(patterns: list[str], sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """The parameters of each regex; every parameter in exactly one, no regex without any."""
    members: dict[str, list[str]] = {pattern: [] for pattern in patterns}
    for name in sizes:
        matching = [pattern for pattern in patterns if search(pattern, name)]
        if len(matching) > 1:
            raise ConfigError(f"budget groups overlap: parameter {name!r} must match exactly one, matches {matching}")
        if not matching:
            raise ConfigError(
                f"parameter {name!r} matches none of the budget groups {patterns}; add a group for it, "
                "or leave it out of the targets"
            )
        members[matching[0]].append(name)
    empty = [pattern for pattern, names in members.items() if not names]
    if empty:
        example = next(iter(sizes), None)
        raise ConfigError(f"budget groups {empty} match no targeted parameter; the names look like {example!r}")
    return members


def _apportion(total: int, proportions: Sequence[int]) -> list[int]:
    """Split a total in proportion, exactly: largest remainders, ties to the first."""
    whole = sum(proportions)
    if whole == 0:
        return [0] * len(proportions)
    counts, remainders = [], []
    for proportion in proportions:
        count, remainder = divmod(total * proportion, whole)
        counts.append(count)
        remainders.append(remainder)
    # Python's sort is stable, so equal remainders keep their order. A remainder of zero never gets more: the number of
    # counts to raise is the sum of remainder / whole, which is less than how many remainders are not zero.
    by_remainder = sorted(range(len(counts)), key=lambda i: -remainders[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _check_density(density: float) -> None:
    check_share("density", density, way_out="To give an absolute number of weights use num_weights=...")


def _checked_share(pattern: str, share: float) -> Fraction:
    if not is_number(share) or not 0 <= share <= 1:
        raise ConfigError(f"the share of budget group {pattern!r} must be in [0, 1], got {share}")
    return as_decimal(share)


def _rank_one_count(shapes: Mapping[str, tuple[int, ...]], linear_names: Collection[str]) -> int:
    """in + out, summed over the linear weights: the parameters of LoRA of rank one."""
    linear = set(linear_names)
    matrices = [shape for name, shape in shapes.items() if name in linear]
    if not matrices:
        way_out = "Use density or num_weights"
        raise ConfigError(f"equivalent_rank counts weights of linear layers, but none is targeted. {way_out}")
    odd = [shape for shape in matrices if len(shape) != 2]
    if odd:
        raise ConfigError(f"equivalent_rank needs two-dimensional linear weights, got the shape {odd[0]}")
    return sum(rows + columns for rows, columns in matrices)

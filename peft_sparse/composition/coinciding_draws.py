"""Adapters whose random supports coincide: added up they change the same weights twice instead of others."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from ..core.delta import SparseDelta
from ..core.indices import union

logger = logging.getLogger(__name__)

# Methods whose supports are drawn, or start from a draw.
RANDOM_METHODS = ("rand", "spiel_ag", "spiel_ma")
# Shares of the smaller support: above the first one and this many times what chance gives, two draws are no two draws.
_COINCIDING, _TIMES_CHANCE = 0.8, 3.0

_WAY_OUT = (
    "They were drawn with the same seed, method, task and name, and their sum changes the same weights twice. Train "
    "one with another seed=..., or under another adapter_name."
)


def shared_positions(
    one: Mapping[str, SparseDelta], other: Mapping[str, SparseDelta], *, at_least: float
) -> tuple[float, float] | None:
    """What share of the smaller support the larger one has too, and what share two independent draws would have.

    Args:
        one, other: {parameter: delta}; parameters that only one of them tunes count as not shared.
        at_least: smallest share of interest, in [0, 1].

    Returns:
        both shares; None as soon as the first can no longer be `at_least` as large, or if a support is empty.
    """
    smaller = min(sum(delta.count for delta in part.values()) for part in (one, other))
    if not smaller:
        return None
    pairs = [(one[name], other[name]) for name in one if name in other]
    most = sum(min(a.count, b.count) for a, b in pairs)
    shared, expected = 0, 0.0
    for a, b in pairs:
        if most < at_least * smaller:
            return None
        if a.count and b.count:
            own = a.count + b.count - union([a.indices.cpu(), b.indices.cpu()]).numel()
            shared, most = shared + own, most - min(a.count, b.count) + own
            expected += a.count * b.count / a.numel
    return shared / smaller, expected / smaller


def warn_of_coinciding_draws(
    names: Sequence[str],
    configs: Sequence[Mapping[str, Any]],
    parts: Sequence[Mapping[str, SparseDelta]],
    factors: Sequence[float] | None,
) -> None:
    """Log a warning about each pair of adapters whose random supports coincide far above chance.

    An average, whose factors add up to 1, is of one support by intent: of a run's checkpoints, or of runs on one task.

    Args:
        names: what to call the adapters.
        configs: of each, as its file has it.
        parts: {parameter: delta} of each.
        factors: of each in the sum; None for a sum of all as they are.
    """
    if factors is not None and math.isclose(sum(factors), 1.0):
        return
    halves = [(name, config) for name, config in zip(names, configs, strict=True) if config.get("random_share")]
    for (one, its), (other, theirs) in combinations(halves, 2):
        if all(its.get(field) == theirs.get(field) for field in ("drawn_for", "seed")):
            logger.warning("The random parts of %s and %s are the same weights. %s", one, other, _WAY_OUT)
    random = [n for n, config in enumerate(configs) if config.get("method") in RANDOM_METHODS]
    for i, j in combinations(random, 2):
        found = shared_positions(parts[i], parts[j], at_least=_COINCIDING)
        if found is None:
            continue
        shared, expected = found
        if shared >= _COINCIDING and shared > _TIMES_CHANCE * expected:
            logger.warning(
                "The random supports of %s and %s share %.0f %% of their weights, where two independent draws would "
                "share %.0f %%. %s",
                names[i],
                names[j],
                100 * shared,
                100 * expected,
                _WAY_OUT,
            )

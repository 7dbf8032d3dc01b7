"""What fits into a limit: the largest density of a method, and the methods that do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import floor, log10

from ..errors import ConfigError
from ..tuners.sparse_ft.configs.base import SparseConfig
from .plan import MemoryPlan


def largest_density(
    config: SparseConfig, plan_with: Callable[[SparseConfig], MemoryPlan], limit: int
) -> tuple[float, MemoryPlan] | None:
    """The largest density at which a method fits, rounded down to two digits, and the plan for it.

    Args:
        config: the method; what it says about how many weights is replaced.
        plan_with: makes the plan of a config.
        limit: bytes.

    Returns:
        None if the method does not fit whatever the density. A plan that was made says so: none is extrapolated.

    Cost: about five plans.
    """
    low, high = 1e-5, 1.0

    def at(density: float) -> MemoryPlan:
        return plan_with(dataclasses.replace(config, density=density, num_weights=None, equivalent_rank=None))

    plans = {low: at(low), high: at(high)}
    if not plans[low].fits(limit):
        return None
    for _ in range(4):
        if plans[high].fits(limit):
            return high, plans[high]
        # Memory grows nearly linearly with the number of weights.
        slope = (plans[high].peak - plans[low].peak) / (high - low)
        guess = _rounded_down(low + (limit - plans[low].peak) / slope)
        if not low < guess < high:
            break
        plans[guess] = at(guess)
        low, high = (guess, high) if plans[guess].fits(limit) else (low, guess)
    return low, plans[low]


def _rounded_down(density: float) -> float:
    """To two digits."""
    if density <= 0:
        return 0.0
    digit = 10.0 ** (floor(log10(density)) - 1)
    return round(floor(density / digit + 1e-9) * digit, 10)


def fitting_methods(others: Mapping[str, Callable[[], MemoryPlan]], limit: int) -> dict[str, MemoryPlan]:
    """Those of several plans that fit into a limit, the smallest first. One that cannot be made does not."""
    plans: dict[str, MemoryPlan] = {}
    for name, make in others.items():
        with suppress(ConfigError):
            plans[name] = make()
    return dict(sorted(((n, p) for n, p in plans.items() if p.fits(limit)), key=lambda item: item[1].peak))

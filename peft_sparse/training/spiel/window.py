"""The window of updates before a reselection, in which SpIEL-AG watches the gradients of candidates."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from torch import Tensor

from ...selection.criteria import CRITERIA, WEIGHT
from ...selection.rows import num_rows
from ...tuners.sparse_ft.configs.spiel import SpielAGConfig
from ...tuners.sparse_ft.layers.delta import AdapterDelta
from .estimate import ESTIMATE_PARTS, Estimate
from .gradient_tap import GradientTap
from .growth_factors import GrowthFactors


def tap_gradients(
    config: SpielAGConfig,
    deltas: Mapping[str, AdapterDelta],
    places: Mapping[str, tuple[Any, str]],
    *,
    replaces_all: bool,
    estimates: Mapping[str, Estimate],
) -> dict[str, GradientTap]:
    """Begin to watch the gradients of an adapter's tensors.

    Args:
        config: of the adapter.
        deltas: {parameter name: delta}.
        places: {parameter name: (layer, which of its parameters)}.
        replaces_all: whether the reselection at the end of the window replaces every weight.
        estimates: {parameter name: what the window has seen already}.
    """
    total, numel = (sum(part) for part in zip(*((d.count, d.numel) for d in deltas.values()), strict=True))
    taps = {}
    for name, delta in deltas.items():
        # Where weights move between tensors, a tensor that has lost all of its own may still win others.
        count = total * delta.numel / numel if config.budget == "global" else delta.count
        taps[name] = delta.observer = GradientTap(
            name,
            delta,
            num_candidates=ceil(config.candidates_per_weight * count),
            nomination_updates=config.nomination_updates,
            weigh=_weights_of_growth(config.grow_by, *places[name]),
            estimate=estimates.get(name),
            num_rows=num_rows(config.support_rows, delta.shape),
            rows_anew=replaces_all,
        )
    return taps


def _weights_of_growth(grow_by: str, layer: Any, which: str) -> GrowthFactors | None:
    criterion = CRITERIA[grow_by]
    return GrowthFactors(layer, which, criterion) if WEIGHT in criterion.uses else None


def is_clear(taps: Mapping[str, GradientTap], num_replaced: Mapping[str, int], *, uncertain_share: float) -> bool:
    """Whether the cut between grown and refused candidates is as sure as `uncertain_share` asks."""
    counts = [tap.uncertain(num_replaced[name]) for name, tap in taps.items()]
    return sum(u for u, _ in counts) <= uncertain_share * sum(g for _, g in counts)


def estimates_of(taps: Mapping[str, GradientTap]) -> dict[str, Estimate]:
    """{parameter name: what the window has seen}, of the tensors whose candidates are nominated."""
    return {name: tap.estimate for name, tap in taps.items() if tap.estimate is not None}


def saved_estimates(taps: Mapping[str, GradientTap]) -> dict[str, Tensor]:
    """What the window has seen, as tensors that `read_estimates` knows."""
    seen = estimates_of(taps)
    return {f"window.{part}.{name}": own for name, e in seen.items() for part, own in e.state_dict().items()}


def read_estimates(state: Mapping[str, Tensor], deltas: Mapping[str, AdapterDelta]) -> dict[str, Estimate]:
    """{parameter name: what the window had seen} of a saved state."""
    estimates = {}
    for name, delta in deltas.items():
        if f"window.indices.{name}" in state:
            keys = {part: f"window.{part}.{name}" for part in ESTIMATE_PARTS}
            window = {part: state[key] for part, key in keys.items() if key in state}
            estimates[name] = Estimate.from_state_dict(window, delta.values.device)
    return estimates

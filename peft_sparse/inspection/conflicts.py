"""What adapters will do to each other when they are added up, told before it is done, and shown as tables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from torch import nn

from ..checkpoints.adapter_files import in_list
from ..checks import check_factors
from ..composition.overlap import Deltas, Interference, Overlap, interference, overlap
from ..errors import ConfigError
from ..selection.anatomy import by_group
from ..tables import Sheet
from ..tuners.common.adapter_config import carrier_of
from .reading import adapter_of, read_adapter, read_adapters
from .sheets import NOTHING, layer_labels, pairs_sheet, percent

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Conflicts:
    """How adapters get on with each other. `rich.print` shows it as tables.

    Attributes:
        adapters: their names.
        weights: the factor of each in the sum.
        total: what they undo of each other, over all weights.
        groups: the same per layer group ("embeddings", "encoder.layer.3", "other"), in the order of the model.
        pairs: the overlap of each two of them; the factors play no part in it.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    total: Interference
    groups: Mapping[str, Interference]
    pairs: Mapping[tuple[str, str], Overlap]

    def __rich__(self) -> Group:
        # rich is slow to import.
        from ..tables import to_rich

        return to_rich(conflict_sheets(self))


def conflicts(
    model: nn.Module | Mapping[str, Deltas | str | os.PathLike[str]] | Sequence[str | os.PathLike[str]],
    adapters: Sequence[str] | None = None,
    *,
    weights: Sequence[float] | None = None,
) -> Conflicts:
    """How much several adapters will undo of each other if they are added up: overlap, opposite signs, cancellation.

    At each weight let P be the sum of the positive changes and N that of the negative ones, without its sign. Their
    sum changes the weight by P - N: min(P, N) of each side is undone. `cancelled` is the share of all change that is
    undone, sum 2 min(P, N) / sum (P + N), between 0 (no weight is pulled in opposite directions) and 1 (nothing
    remains); `norm` is the Euclidean norm of min(P, N); `gain` is the norm of the sum over what it would be without a
    shared weight, sqrt(sum of the squared norms). Nothing is modified.

    Args:
        model: a PeftModel that holds the adapters, whichever are active; or {name: adapter}, each adapter the folder or
            Hub id of its files or {parameter name: SparseDelta}; or a list of folders or Hub ids.
        adapters: names of two or more of them; all if None.
        weights: one factor per adapter, of any sign, as for `add_weighted_adapter`; 1 each if None.

    Raises:
        ConfigError: fewer than two adapters, an unknown name, not one weight per adapter, or adapters that were made
            for different base models.
        FormatError: a file is damaged or no sparse adapter.

    Cost: O(k log k) for k weights in all; the dense weights are not touched.
    """
    if isinstance(model, (str, os.PathLike, Sequence)):
        model = {adapter.name: adapter.deltas for adapter in read_adapters(in_list(model))}
    known = list(model) if isinstance(model, Mapping) else list(getattr(carrier_of(model), "peft_config", {}))
    names = known if adapters is None else in_list(adapters)
    unknown = [name for name in names if name not in known]
    if unknown or len(set(names)) != len(names) or len(names) < 2:
        raise ConfigError(f"adapters must name two or more different ones of {known}, got {names}")
    deltas = [_deltas_of(model, name) for name in names]
    factors = [1.0] * len(names) if weights is None else check_factors(weights, len(names))
    groups = by_group(dict.fromkeys(parameter for part in deltas for parameter in part))
    per_group = {
        group: interference([{p: part[p] for p in inside if p in part} for part in deltas], factors)
        for group, inside in groups.items()
    }
    total = sum(per_group.values(), Interference(squares=(0.0,) * len(names)))
    pairs = {(a, b): overlap(deltas[names.index(a)], deltas[names.index(b)]) for a, b in combinations(names, 2)}
    return Conflicts(tuple(names), tuple(factors), total, per_group, pairs)


def _deltas_of(model: nn.Module | Mapping[str, Deltas | str | os.PathLike[str]], name: str) -> Deltas:
    if not isinstance(model, Mapping):
        return adapter_of(model, name).deltas
    given = model[name]
    return given if isinstance(given, Mapping) else read_adapter(given).deltas


def conflict_sheets(found: Conflicts) -> list[Sheet]:
    """What adapters undo of each other, per layer group, and the overlap of each two."""
    stack, labels = layer_labels(list(found.groups))
    rows = [_interference_row(label, part) for label, part in zip(labels, found.groups.values(), strict=True)]
    terms = [
        name if weight == 1 else f"{weight:g} x {name}"
        for name, weight in zip(found.adapters, found.weights, strict=True)
    ]
    main = Sheet(
        f"{' + '.join(terms)}, by layer{stack}",
        ("", "tuned", "shared", "of tuned", "opposite", "cancelled", "norm", "gain"),
        (*rows, _interference_row("all", found.total)),
        has_total=True,
        note="opposite: share of the shared weights that are pulled in opposite directions. cancelled: share of all "
        "change that another adapter undoes. norm: the size of what is undone, in the units of the weights. "
        "gain: norm of the sum over that of adapters without a shared weight; below 1 they weaken each other.",
    )
    return [main, pairs_sheet(found.pairs)]


def _interference_row(name: str, found: Interference) -> tuple[str, ...]:
    return (
        name,
        f"{found.count:,}",
        f"{found.shared:,}",
        percent(found.shared_share),
        percent(found.opposite_share),
        percent(found.cancelled),
        f"{found.norm:.3g}",
        NOTHING if found.gain is None else f"{found.gain:.3f}",
    )

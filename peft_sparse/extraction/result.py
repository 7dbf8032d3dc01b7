"""What an extraction kept of the difference between two models: per tensor, per layer, per part, and in all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ..selection.anatomy import PARTS, place_of


@dataclass(frozen=True)
class Kept:
    """What was kept of a tensor, or of several together.

    Attributes:
        name: the parameter, the layer or the part.
        size: number of weights.
        differing: how many of them differ between base and tuned.
        count: how many of them the adapter tunes.
        squared: sum of the squared differences.
        squared_kept: the part of that sum that the tuned weights carry.
    """

    name: str
    size: int
    differing: int
    count: int
    squared: float
    squared_kept: float

    @property
    def share_kept(self) -> float:
        """Share of the squared difference that the adapter carries, in [0, 1]; 1 where there is none."""
        return self.squared_kept / self.squared if self.squared > 0 else 1.0


@dataclass(frozen=True)
class Extraction:
    """The result of `extract_adapter`.

    Attributes:
        output: where the adapter was saved.
        base, tuned: what it was made from.
        criterion: what ranked the weights.
        tensors: what was kept of each targeted parameter, in the order of the model.
        heads: modules that are saved whole, because only the tuned model has them.
        left_out: parameters that differ although no sparse adapter can hold them (their modules are of no supported
            kind), with the sum of their squared differences.
        values_dtype: dtype of the saved values.
        inexact: how many of the adapter's weights come out not quite as in the tuned model, by the rounding of one
            addition.
        file_size: bytes of the adapter file.
    """

    output: str
    base: str
    tuned: str
    criterion: str
    tensors: tuple[Kept, ...]
    heads: tuple[str, ...]
    left_out: dict[str, float]
    values_dtype: str
    inexact: int
    file_size: int

    @property
    def total(self) -> Kept:
        """All targeted parameters together."""
        return _sum("all", self.tensors)

    @property
    def by_group(self) -> tuple[Kept, ...]:
        """Per layer, in the order of the model: "embeddings", "model.layers.0", ..., "other"."""
        return _grouped(self.tensors, lambda name: place_of(name).group)

    @property
    def by_part(self) -> tuple[Kept, ...]:
        """Per part of a transformer, over all layers: embeddings, attention, feed-forward, norm, other."""
        found = _grouped(self.tensors, lambda name: place_of(name).part)
        return tuple(sorted(found, key=lambda kept: PARTS.index(kept.name)))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and texts, for JSON."""
        rows = {"total": [self.total], "by_group": self.by_group, "by_part": self.by_part, "tensors": self.tensors}
        tables = {key: [{**asdict(k), "share_kept": k.share_kept} for k in kept] for key, kept in rows.items()}
        plain = {k: v for k, v in asdict(self).items() if k != "tensors"}
        return {**plain, "heads": list(self.heads), **tables, "total": tables["total"][0]}


def _grouped(tensors: Iterable[Kept], group_of: Callable[[str], str]) -> tuple[Kept, ...]:
    groups: dict[str, list[Kept]] = {}
    for kept in tensors:
        groups.setdefault(group_of(kept.name), []).append(kept)
    return tuple(_sum(name, members) for name, members in groups.items())


def _sum(name: str, members: Iterable[Kept]) -> Kept:
    members = list(members)
    return Kept(
        name,
        size=sum(k.size for k in members),
        differing=sum(k.differing for k in members),
        count=sum(k.count for k in members),
        squared=sum(k.squared for k in members),
        squared_kept=sum(k.squared_kept for k in members),
    )

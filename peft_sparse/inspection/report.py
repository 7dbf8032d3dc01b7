"""What is in an adapter, as data: where its weights lie, how large they are, where it comes from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..composition.overlap import Deltas, Overlap, overlap
from ..selection.anatomy import PARTS, by_group, place_of
from ..selection.budget import check_budget
from ..selection.patterns import search
from .other_types import OtherReport, is_sparse, report_on_other
from .reading import Adapter, Head, adapter_of, read_adapter

JSON_FORMAT = 1
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
# Fields of the config that are elsewhere in a report, or that only PEFT itself has a use for.
_TOLD_ELSEWHERE = {
    *("counts", "budget", "peft_type", "auto_mapping", "inference_mode", "init_weights"),
    *("method", "base_model_name_or_path", "revision", "peft_version", "modules_to_save"),
    *("density", "density_of", "num_weights", "equivalent_rank"),
}


@dataclass(frozen=True)
class Tally:
    """So many weights are tuned, of so many that the tuned tensors have.

    Tensors that the adapter does not tune at all are not in its file, and so not in `numel`.
    """

    count: int = 0
    numel: int = 0

    def __add__(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(self.count + other.count, self.numel + other.numel)

    @property
    def density(self) -> float | None:
        """count / numel; None where there is nothing."""
        return self.count / self.numel if self.numel else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"count": self.count, "numel": self.numel, "density": self.density}


@dataclass(frozen=True)
class LayerGroup:
    """A layer, the embeddings, or what lies outside of both ("other").

    Attributes:
        name: such as "encoder.layer.3" (`Place.group`).
        stack: path of the list of layers; "" outside of layers.
        layer: index in it; None outside of layers.
        parts: {part: tally}, of the parts that occur, in the order of `anatomy.PARTS`.
        squares: {part: sum of the squared changes} of the same parts.
    """

    name: str
    stack: str
    layer: int | None
    parts: Mapping[str, Tally]
    squares: Mapping[str, float]

    @property
    def all(self) -> Tally:
        """All parts together."""
        return sum(self.parts.values(), Tally())

    @property
    def norm(self) -> float:
        """Euclidean norm of the changes."""
        return sqrt(sum(self.squares.values()))


@dataclass(frozen=True)
class BudgetShare:
    """What a group of the budget asked for, and what it got.

    Attributes:
        pattern: the group's regex.
        asked: share of the total, in (0, 1].
        found: the tuned weights of the parameters that the regex finds.
    """

    pattern: str
    asked: float
    found: Tally


@dataclass(frozen=True)
class Values:
    """How large the changes are.

    Attributes:
        dtype: dtype of the values, such as "float32"; several are joined by "+".
        norm: Euclidean norm of all of them, in the units of the weights.
        zeros: share of values that are exactly 0 (they take space and change nothing); None without values.
        quantiles: {q: quantile of |change|} for `QUANTILES`, interpolated linearly; empty without values.
    """

    dtype: str
    norm: float
    zeros: float | None
    quantiles: Mapping[float, float]


@dataclass(frozen=True)
class AdapterReport:
    """What `inspect_adapter` finds.

    Attributes:
        name: what the adapter is called here.
        source: where it came from.
        method: what chose its weights, such as "lottery_ticket".
        base_model: name of the base model; None if the config does not say.
        revision: of the base model.
        peft_version: that wrote the config.
        digest: of the adapter file, in hexadecimal; None for an adapter of a model.
        request: what was asked for: {"density": 0.02, "density_of": "targets"} and the like.
        budget: how the total was to be spread: "uniform", "global" or {regex: share}.
        budget_shares: for {regex: share}, what each group got.
        settings: the config's other fields that are set (seed, targets, l1, ...).
        groups: weights by layer, in the order of the model.
        parts: weights by part of a transformer, {part: tally}.
        tensors: how many tensors are tuned.
        values: how large the changes are.
        heads: tensors that the file holds whole; none for an adapter of a model.
        file_bytes: size of the file; None for an adapter of a model.
    """

    name: str
    source: str
    method: str
    base_model: str | None
    revision: str | None
    peft_version: str | None
    digest: str | None
    request: Mapping[str, Any]
    budget: Any
    budget_shares: Sequence[BudgetShare]
    settings: Mapping[str, Any]
    groups: Sequence[LayerGroup]
    parts: Mapping[str, Tally]
    tensors: int
    values: Values
    heads: Sequence[Head]
    file_bytes: int | None

    @property
    def total(self) -> Tally:
        """All tuned weights."""
        return sum(self.parts.values(), Tally())

    @property
    def shows_change(self) -> bool:
        """Whether tables and pictures of the layers show the change: a uniform budget makes the weights equal."""
        return self.budget == "uniform" and self.values.norm > 0

    @property
    def bytes_per_weight(self) -> float | None:
        """Size of the file without the heads, per tuned weight; None without a file or weights."""
        if self.file_bytes is None or not self.total.count:
            return None
        return (self.file_bytes - sum(head.bytes for head in self.heads)) / self.total.count

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the keys are part of the library's interface."""
        total = self.total.count
        return {
            "name": self.name,
            "source": self.source,
            "provenance": {
                "method": self.method,
                "base_model": self.base_model,
                "revision": self.revision,
                "peft_version": self.peft_version,
                "digest": self.digest,
                "settings": dict(self.settings),
            },
            "request": dict(self.request),
            "budget": self.budget,
            "budget_shares": [
                {"pattern": group.pattern, "asked": group.asked, "share": _share(group.found, total)}
                | group.found.to_dict()
                for group in self.budget_shares
            ],
            "total": {"tensors": self.tensors} | self.total.to_dict(),
            "groups": [
                {"name": group.name, "stack": group.stack, "layer": group.layer, "share": _share(group.all, total)}
                | group.all.to_dict()
                | {"norm": group.norm}
                | {"parts": {part: tally.to_dict() for part, tally in group.parts.items()}}
                for group in self.groups
            ],
            "parts": {part: {"share": _share(tally, total)} | tally.to_dict() for part, tally in self.parts.items()},
            "values": {
                "dtype": self.values.dtype,
                "norm": self.values.norm,
                "zeros": self.values.zeros,
                "quantiles": {f"{q:g}": value for q, value in self.values.quantiles.items()},
            },
            "heads": [
                {"name": head.name, "shape": list(head.shape), "dtype": head.dtype, "bytes": head.bytes}
                for head in self.heads
            ],
            "file": None
            if self.file_bytes is None
            else {"bytes": self.file_bytes, "bytes_per_weight": self.bytes_per_weight},
        }


def _share(tally: Tally, total: int) -> float | None:
    return tally.count / total if total else None


def report_on(adapter: Adapter) -> AdapterReport:
    """What is in an adapter.

    Args:
        adapter: read by `read_adapter` or `adapter_of`.
    """
    config, deltas = adapter.config, adapter.deltas
    groups = layer_groups(deltas)
    occurring = [part for part in PARTS if any(part in group.parts for group in groups)]
    return AdapterReport(
        name=adapter.name,
        source=adapter.source,
        method=str(config.get("method", "unknown")),
        base_model=config.get("base_model_name_or_path"),
        revision=config.get("revision"),
        peft_version=config.get("peft_version"),
        digest=adapter.digest,
        request=_request(config),
        budget=config.get("budget"),
        budget_shares=budget_shares(config.get("budget"), deltas),
        settings={key: config[key] for key in sorted(config) if key not in _TOLD_ELSEWHERE and _is_set(config[key])},
        groups=groups,
        parts={part: sum((g.parts.get(part, Tally()) for g in groups), Tally()) for part in occurring},
        tensors=sum(delta.count > 0 for delta in deltas.values()),
        values=value_statistics(deltas),
        heads=tuple(adapter.heads),
        file_bytes=adapter.file_bytes,
    )


def inspect_adapter(
    source: str | os.PathLike[str] | nn.Module, *, adapter_name: str = "default"
) -> AdapterReport | OtherReport:
    """What is in an adapter: where its weights lie, how large the changes are, where it comes from.

    Of files only the adapter's own are read, not the base model.

    Args:
        source: folder or Hub id ("owner/name[/folder][@revision]") of an adapter, or a model that holds it.
        adapter_name: its name in the model; without meaning for files.

    Returns:
        the report on a sparse adapter; on files of other types (bottleneck, MAD-G, Ada-SFT, and those of PEFT) a
        shorter one.

    Raises:
        ConfigError: there is no such adapter.
        FormatError: the file is damaged, or of another library.
    """
    if isinstance(source, nn.Module):
        return report_on(adapter_of(source, adapter_name))
    return report_on(read_adapter(source)) if is_sparse(source) else report_on_other(source)


def _is_set(value: Any) -> bool:
    """Whether a field says something. An integer 0 does (a seed), a float 0.0 does not (a penalty)."""
    return not (value is None or value is False or value in ([], {}) or (isinstance(value, float) and value == 0))


def _request(config: Mapping[str, Any]) -> dict[str, Any]:
    request = {key: config[key] for key in ("density", "num_weights", "equivalent_rank") if config.get(key) is not None}
    return request | {"density_of": config.get("density_of")} if "density" in request else request


def tally_of(deltas: Deltas, names: Iterable[str]) -> Tally:
    """The weights of some parameters."""
    return sum((Tally(deltas[name].count, deltas[name].numel) for name in names), Tally())


def layer_groups(deltas: Deltas) -> tuple[LayerGroup, ...]:
    """Tuned weights by layer and part, in the order of the model.

    Source: the distribution over layers of SC-SFT (Sharma & Chauhan, Fig. 1 and 2), whose "non-attention" is all parts
        of a layer but attention.
    """
    found = []
    for group, names in by_group(deltas).items():
        place = place_of(names[0])
        members = {part: [name for name in names if place_of(name).part == part] for part in PARTS}
        parts = {part: tally_of(deltas, inside) for part, inside in members.items() if inside}
        squares = {part: sum(_squares(deltas[name].values) for name in members[part]) for part in parts}
        found.append(LayerGroup(group, place.stack, place.layer, parts, squares))
    return tuple(found)


def value_statistics(deltas: Deltas) -> Values:
    """How large the changes are, over all parameters together.

    Cost: one float32 copy of all values.
    """
    filled = [delta.values.detach() for delta in deltas.values() if delta.count]
    dtypes = sorted({str(values.dtype).removeprefix("torch.") for values in filled})
    norm = sqrt(sum(map(_squares, filled)))
    if not filled:
        return Values("", norm, None, {})
    sizes = torch.cat([values.float().abs() for values in filled]).numpy()
    quantiles = np.quantile(sizes, QUANTILES).tolist()
    return Values("+".join(dtypes), norm, float((sizes == 0).mean()), dict(zip(QUANTILES, quantiles, strict=True)))


def _squares(values: Tensor) -> float:
    return float(values.detach().double().square().sum())


def budget_shares(budget: Any, deltas: Deltas) -> tuple[BudgetShare, ...]:
    """What the groups of a {regex: share} budget got; nothing for budgets of another kind.

    Raises:
        ConfigError: the budget is none that could have been asked for.
    """
    if not isinstance(budget, Mapping):
        return ()
    check_budget(budget)
    return tuple(
        BudgetShare(pattern, share, tally_of(deltas, [name for name in deltas if search(pattern, name)]))
        for pattern, share in budget.items()
    )


def pairwise(adapters: Sequence[Adapter]) -> dict[tuple[str, str], Overlap]:
    """The overlap of each two of several adapters, by their names, in the order given."""
    return {(a.name, b.name): overlap(a.deltas, b.deltas) for a, b in combinations(adapters, 2)}


def overlap_to_dict(pair: tuple[str, str], found: Overlap) -> dict[str, Any]:
    """Plain values for JSON; the keys are part of the library's interface."""
    return {
        "adapters": list(pair),
        "tensors": found.tensors,
        "shared": found.shared,
        "overlap": found.share,
        "chance": found.chance,
        "jaccard": found.jaccard,
        "opposite": found.opposite,
        "opposite_share": found.opposite_share,
        "cosine": found.cosine,
    }


def document(
    reports: Sequence[AdapterReport], pairs: Mapping[tuple[str, str], Overlap], others: Sequence[OtherReport] = ()
) -> dict[str, Any]:
    """One JSON document about several adapters: what `peft-sparse inspect --json` prints.

    Keys: "format" (1; grows when a key changes its meaning or goes, not when one is added), "adapters" (a list, see
    `AdapterReport.to_dict`), "pairs" (a list, see `overlap_to_dict`; empty for one adapter) and "other_types" (a list,
    see `OtherReport.to_dict`). Shares, densities and quantiles are fractions; what cannot be said (the cosine with a
    zero delta) is null.
    """
    return {
        "format": JSON_FORMAT,
        "adapters": [report.to_dict() for report in reports],
        "pairs": [overlap_to_dict(pair, found) for pair, found in pairs.items()],
        "other_types": [report.to_dict() for report in others],
    }

"""Reports as tables of text, the same for the terminal and for a web page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..composition.overlap import Overlap
from ..tables import Sheet
from .other_types import OtherReport
from .report import AdapterReport, Tally

_BAR_WIDTH = 8
_EIGHTHS = " ▏▎▍▌▋▊▉█"
NOTHING = "-"


def report_sheets(
    reports: Sequence[AdapterReport], pairs: Mapping[tuple[str, str], Overlap], others: Sequence[OtherReport] = ()
) -> list[Sheet]:
    """Everything about some adapters: each on its own, then each two together."""
    sheets = [sheet for report in reports for sheet in adapter_sheets(report)]
    sheets += [sheet for report in others for sheet in other_sheets(report)]
    return [*sheets, pairs_sheet(pairs)] if pairs else sheets


def adapter_sheets(report: AdapterReport) -> list[Sheet]:
    """Everything about one adapter."""
    sheets = [facts_sheet(report), parts_sheet(report), layers_sheet(report)]
    if report.budget_shares:
        sheets.append(budget_sheet(report))
    if report.heads:
        sheets.append(heads_sheet(report))
    return sheets


def other_sheets(report: OtherReport) -> list[Sheet]:
    """Provenance and size of an adapter of another type, and its tensors by layer."""
    facts = {
        "from": report.source,
        "type": report.peft_type,
        "base model": _base_text(report),
        "file": f"{report.file_bytes:,} bytes: {report.numel:,} numbers, {report.dtype}",
        "settings": _settings_text(report),
        "written by": f"PEFT {report.peft_version}" if report.peft_version else "not said",
    }
    stack, labels = layer_labels([group.name for group in report.groups])
    rows = [
        (
            label,
            f"{group.tensors:,}",
            f"{group.numel:,}",
            f"{group.norm:.3g}",
            NOTHING if group.change is None else f"{group.change:.3g}",
        )
        for label, group in zip(labels, report.groups, strict=True)
    ]
    layers = Sheet(
        f"{report.name}: tensors by layer{stack}",
        ("", "tensors", "numbers", "norm", "|change|"),
        tuple(rows),
        note="norm: of the tensors themselves. |change|: Euclidean norm of the change that they make to the weights.",
    )
    return [Sheet(report.name, ("", ""), tuple(facts.items())), layers]


def facts_sheet(report: AdapterReport) -> Sheet:
    """Provenance, size and values."""
    total = report.total
    facts = {
        "from": report.source,
        "method": report.method,
        "base model": _base_text(report),
        "asked for": ", ".join(f"{key}={value}" for key, value in report.request.items()) or "not said",
        "budget": "shares per group, below" if report.budget_shares else str(report.budget),
        "tuned": f"{total.count:,} weights in {report.tensors} tensors, {percent(total.density)} of their elements",
        **({"file": _file_text(report)} if report.file_bytes is not None else {}),
        "values": _values_text(report),
        "|change|": _quantiles_text(report),
        "settings": _settings_text(report),
        "written by": f"PEFT {report.peft_version}" if report.peft_version else "not said",
        **({"digest": report.digest} if report.digest else {}),
    }
    return Sheet(report.name, ("", ""), tuple(facts.items()))


def parts_sheet(report: AdapterReport) -> Sheet:
    """Weights by part of a transformer."""
    rows = [_tally_row(part, tally, report) for part, tally in report.parts.items()]
    return Sheet(
        f"{report.name}: tuned weights by part",
        ("part", "weights", "of", "density", "share"),
        (*rows, _tally_row("all", report.total, report)),
        has_total=True,
        note="of: elements of the tuned tensors. share: of the adapter's weights.",
    )


def _tally_row(name: str, tally: Tally, report: AdapterReport) -> tuple[str, ...]:
    share = tally.count / report.total.count if report.total.count else None
    return name, f"{tally.count:,}", f"{tally.numel:,}", percent(tally.density), percent(share)


def layers_sheet(report: AdapterReport) -> Sheet:
    """Weights by layer, and inside layers by part."""
    stack, labels = layer_labels([group.name for group in report.groups])
    # What lies outside of layers is one part, or next to nothing: its sum says it.
    inside = [group.parts if group.layer is not None else {} for group in report.groups]
    parts = [part for part in report.parts if any(part in found for found in inside)]
    total = report.total.count
    # Equal shares were asked for: what differs is how far the weights moved.
    of_change = report.shows_change
    sizes = [group.norm if of_change else group.all.count for group in report.groups]
    largest = max(sizes, default=0)
    rows = [
        (
            label,
            *(f"{found[part].count:,}" if part in found else "" for part in parts),
            f"{group.all.count:,}",
            percent(group.all.density),
            f"{group.norm:.3g}" if of_change else percent(group.all.count / total if total else None),
            _bar(size / largest if largest else 0),
        )
        for label, group, found, size in zip(labels, report.groups, inside, sizes, strict=True)
    ]
    last = "|change|" if of_change else "share"
    return Sheet(f"{report.name}: tuned weights by layer{stack}", ("", *parts, "all", "density", last, ""), tuple(rows))


def layer_labels(groups: Sequence[str]) -> tuple[str, list[str]]:
    """Where the layers are, for the title, and short names of the groups; long ones if there are several stacks."""
    stacks = {group.rpartition(".")[0] for group in groups} - {""}
    if len(stacks) != 1:
        return "", list(groups)
    stack = stacks.pop()
    return f" of {stack}", [group.replace(f"{stack}.", "layer ") for group in groups]


def budget_sheet(report: AdapterReport) -> Sheet:
    """What each group of the budget asked for and got."""
    total = report.total.count
    rows = [
        (
            group.pattern,
            percent(group.asked),
            percent(group.found.count / total if total else None),
            f"{group.found.count:,}",
            percent(group.found.density),
        )
        for group in report.budget_shares
    ]
    return Sheet(f"{report.name}: budget", ("group", "asked", "share", "weights", "density"), tuple(rows))


def heads_sheet(report: AdapterReport) -> Sheet:
    """Tensors that are saved whole."""
    rows = [(head.name, " x ".join(map(str, head.shape)), head.dtype, f"{head.bytes:,}") for head in report.heads]
    return Sheet(f"{report.name}: saved whole (heads)", ("tensor", "shape", "dtype", "bytes"), tuple(rows))


def pairs_sheet(pairs: Mapping[tuple[str, str], Overlap]) -> Sheet:
    """Overlap, opposite signs and cosine of each two adapters."""
    rows = [
        (
            f"{a} and {b}",
            f"{found.shared:,}",
            percent(found.share),
            percent(found.chance),
            percent(found.jaccard),
            percent(found.opposite_share),
            NOTHING if found.cosine is None else f"{found.cosine:+.3f}",
        )
        for (a, b), found in pairs.items()
    ]
    strangers = [f"{a} and {b}" for (a, b), found in pairs.items() if not found.tensors]
    note = (
        "overlap: shared / weights of the smaller adapter. by chance: had both drawn at random within every tensor. "
        "opposite: share of the shared weights that change in opposite directions."
    )
    if strangers:
        note += f" No tensor in common ({', '.join(strangers)}): tuned through different model classes?"
    columns = ("adapters", "shared", "overlap", "by chance", "Jaccard", "opposite", "cosine")
    return Sheet("Each two adapters", columns, tuple(rows), note=note)


def _file_text(report: AdapterReport) -> str:
    heads = sum(head.bytes for head in report.heads)
    size = f"{report.file_bytes:,} bytes"
    if heads:
        size += f", of which heads {heads:,}"
    each = report.bytes_per_weight
    return size if each is None else f"{size}; {each:.2f} bytes a tuned weight"


def _base_text(report: AdapterReport | OtherReport) -> str:
    return " @ ".join(text for text in (report.base_model, report.revision) if text) or "not said"


def _settings_text(report: AdapterReport | OtherReport) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in report.settings.items()) or "none"


def _values_text(report: AdapterReport) -> str:
    values = report.values
    if values.zeros is None:
        return "none"
    return f"{values.dtype}, norm {values.norm:.4g}, {percent(values.zeros)} exactly 0"


def _quantiles_text(report: AdapterReport) -> str:
    named = {0.0: "min", 0.5: "median", 1.0: "max"}
    found = report.values.quantiles.items()
    return ", ".join(f"{named.get(q, f'{q:.0%}')} {value:.2g}" for q, value in found) or "none"


def _short(value: Any) -> str:
    """A value in a line: of a long list, its length."""
    if isinstance(value, (list, Mapping)) and len(value) > 4:
        return f"({len(value)} entries)"
    return str(value)


def percent(share: float | None) -> str:
    if share is None:
        return NOTHING
    digits = 0 if share in (0, 1) else 1 if share >= 0.0995 else 2
    return f"{share:.{digits}%}"


def _bar(share: float) -> str:
    whole, rest = divmod(round(share * _BAR_WIDTH * 8), 8)
    return _EIGHTHS[8] * whole + _EIGHTHS[rest].strip()

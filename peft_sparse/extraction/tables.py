"""The report of an extraction as a table for people."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from ..tables import FittingTable
from .result import Extraction, Kept


def to_rich(extraction: Extraction) -> RenderableType:
    """A table of what was kept per layer and per part, and what there is to say besides."""
    groups, parts = extraction.by_group, extraction.by_part
    rows = [_row(kept) for kept in (*groups, *parts, extraction.total)]
    table = FittingTable(
        f"{extraction.tuned} minus {extraction.base}",
        ("", "weights", "differ", "kept", "density", "share of the squared difference"),
        rows,
        bold=frozenset({len(rows) - 1}),
        sections=frozenset({len(groups) - 1, len(rows) - 2}),
        is_framed=True,
    )
    return Group(table, *(Text(line) for line in _notes(extraction)))


def _row(kept: Kept) -> tuple[str, ...]:
    density = f"{kept.count / max(1, kept.size):.2%}"
    return (kept.name, f"{kept.size:,}", f"{kept.differing:,}", f"{kept.count:,}", density, f"{kept.share_kept:.2%}")


def _notes(extraction: Extraction) -> list[str]:
    notes = [f"Saved in {extraction.output}: {extraction.file_size:,} bytes, values in {extraction.values_dtype}."]
    if extraction.heads:
        notes.append(f"Saved whole, as the tuned model has them: {', '.join(extraction.heads)}.")
    if extraction.left_out:
        notes.append(f"Left behind, since no sparse adapter can hold them: {', '.join(extraction.left_out)}.")
    if extraction.inexact:
        notes.append(
            f"{extraction.inexact:,} of these weights differ from the tuned ones by the rounding of one addition."
        )
    return notes

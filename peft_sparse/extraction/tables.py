"""The report of an extraction as a table for people."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .report import Extraction, Kept


def to_rich(extraction: Extraction) -> RenderableType:
    """A table of what was kept per layer and per part, and what there is to say besides."""
    table = Table(title=f"{extraction.tuned} minus {extraction.base}", title_justify="left")
    table.add_column("")
    for column in ("weights", "differ", "kept", "density", "share of the squared difference"):
        table.add_column(column, justify="right")
    _add_rows(table, extraction.by_group)
    _add_rows(table, extraction.by_part)
    _add_rows(table, [extraction.total])
    return Group(table, *(Text(line) for line in _notes(extraction)))


def _add_rows(table: Table, rows: Iterable[Kept]) -> None:
    for kept in rows:
        cells = (f"{kept.size:,}", f"{kept.differing:,}", f"{kept.count:,}", f"{kept.count / max(1, kept.size):.2%}")
        table.add_row(kept.name, *cells, f"{kept.share_kept:.2%}")
    table.add_section()


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

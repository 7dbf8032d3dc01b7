"""Sheets in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .sheets import Sheet

# Text as short as this is not folded, however narrow the terminal.
_MIN_TEXT = 24


def to_rich(sheets: Sequence[Sheet]) -> Group:
    """Sheets as something that rich prints."""
    parts: list[Table | Text] = []
    for sheet in sheets:
        parts.append(_table(sheet))
        if sheet.note:
            parts.append(Text(sheet.note, style="dim"))
        parts.append(Text(""))
    return Group(*parts)


def _table(sheet: Sheet) -> Table:
    table = Table(
        title=Text(sheet.title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_header=any(sheet.columns),
        pad_edge=False,
        collapse_padding=True,
    )
    for position, heading in enumerate(sheet.columns):
        if sheet.is_text[position]:
            longest = max((len(row[position]) for row in sheet.rows), default=0)
            table.add_column(heading, min_width=min(longest, _MIN_TEXT), overflow="fold")
        else:  # a number that is cut is of no use
            table.add_column(heading, justify="right", no_wrap=True)
    for number, row in enumerate(sheet.rows, start=1):
        is_total = sheet.has_total and number == len(sheet.rows)
        table.add_row(*map(Text, row), style="bold" if is_total else None)
    return table

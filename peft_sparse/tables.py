"""Sheets in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

# Text as short as this is not folded, however narrow the terminal, unless a number would be cut otherwise.
_MIN_TEXT = 24
_BETWEEN = 2


@dataclass(frozen=True)
class Sheet:
    """A table: the first column and those without a heading are text, the others are numbers.

    Attributes:
        title: what is above it.
        columns: their headings.
        rows: one text per column.
        has_total: whether the last row is a sum of the others.
        note: what is below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    has_total: bool = False
    note: str = ""

    @property
    def is_text(self) -> tuple[bool, ...]:
        """Of each column, whether it is text."""
        return tuple(position == 0 or not heading for position, heading in enumerate(self.columns))


@dataclass(frozen=True)
class FittingTable:
    """A table of which a narrow terminal shows some columns at a time: a number that is cut is of no use.

    Attributes:
        title: what is above it.
        columns: their headings; the first column and those without a heading are text, the others are numbers.
        rows: one text per column.
        bold: numbers of rows that are sums of others.
        sections: numbers of rows below which a line is drawn.
        is_framed: whether there are lines around it and between its columns.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: frozenset[int] = field(default_factory=frozenset)
    sections: frozenset[int] = field(default_factory=frozenset)
    is_framed: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        first, *others = self._widths()
        between = _BETWEEN + self.is_framed
        space = options.max_width - (2 * between if self.is_framed else between)
        others = [width + between for width in others]
        for number, shown in enumerate(_fitting(min(first, _MIN_TEXT), others, space)):
            left = space - sum(others[position] for position in shown)
            yield self._table([0, *(position + 1 for position in shown)], left, with_title=number == 0)

    def _widths(self) -> list[int]:
        return [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]

    def _table(self, shown: Sequence[int], label_width: int, *, with_title: bool) -> Table:
        table = Table(
            title=Text(self.title, style="bold") if with_title else None,
            title_justify="left",
            box=box.HEAVY_HEAD if self.is_framed else box.SIMPLE_HEAD,
            show_header=any(self.columns),
            pad_edge=self.is_framed,
            collapse_padding=not self.is_framed,
        )
        for position in shown:
            if position == 0 or not self.columns[position]:
                width = self._widths()[position]
                table.add_column(
                    self.columns[position], min_width=max(1, min(width, _MIN_TEXT, label_width)), overflow="fold"
                )
            else:
                table.add_column(self.columns[position], justify="right", no_wrap=True)
        for number, row in enumerate(self.rows):
            cells = [Text(row[position]) for position in shown]
            table.add_row(*cells, style="bold" if number in self.bold else None, end_section=number in self.sections)
        return table


def _fitting(label: int, widths: Sequence[int], available: int) -> list[list[int]]:
    """Which columns are side by side behind the labels: as many as fit, at least one."""
    parts: list[list[int]] = [[]]
    used = label
    for position, width in enumerate(widths):
        if parts[-1] and used + width > available:
            parts.append([])
            used = label
        parts[-1].append(position)
        used += width
    return parts


def to_rich(sheets: Sequence[Sheet]) -> Group:
    """Sheets as something that rich prints."""
    parts: list[RenderableType] = []
    for sheet in sheets:
        total = frozenset({len(sheet.rows) - 1} if sheet.has_total else ())
        parts.append(FittingTable(sheet.title, sheet.columns, sheet.rows, bold=total))
        if sheet.note:
            parts.append(Text(sheet.note, style="dim"))
        parts.append(Text(""))
    return Group(*parts)

"""Tables in narrow terminals: no number is cut, whatever the width."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from peft_sparse.tables import FittingTable, Sheet, to_rich

COLUMNS = ("", "attention", "feed-forward", "all", "density", "share", "")
NAMES = ("model.layers.10.self_attn.a_very_long_name_of_a_projection", "layer 1", "all")
ROWS = tuple((name, f"{i}13,108", f"{i}19,662,004", f"{i}32,770,112", "5.00%", f"{i}6.7%", "█▌") for i, name in
             enumerate(NAMES, start=1))  # fmt: skip


def shown(table: object, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(table)
    return file.getvalue()


@pytest.mark.parametrize("width", [24, 40, 60, 80, 100, 200])
@pytest.mark.parametrize("kind", ["sheet", "framed"])
def test_no_number_is_cut(kind, width):
    framed = FittingTable("A title", COLUMNS, ROWS, bold=frozenset({2}), sections=frozenset({1}), is_framed=True)
    text = shown(to_rich([Sheet("A title", COLUMNS, ROWS, has_total=True)]) if kind == "sheet" else framed, width)
    assert "…" not in text
    found = re.findall(r"[\d,.]+%?", text)
    for row in ROWS:
        for cell in row[1:-1]:
            assert cell in found
    assert max(map(len, text.splitlines())) <= width
    assert text.count("A title") == 1
    letters = re.sub(r"[^\w.]", "", text)
    assert "layer1" in letters


def test_wide_terminals_get_one_table():
    assert shown(to_rich([Sheet("t", COLUMNS, ROWS)]), 120).count("attention") == 1

"""The importance of typological features as a table and as a picture."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from peft_sparse import ConfigError, FeatureImportance, importance_table, plot_importance

IMPORTANCE = FeatureImportance(
    features=["S_SVO", "S_SOV", "P_TONE"],
    sites=["layer.0", "layer.1"],
    by_site=torch.tensor([[3.0, 0.0, 2.0], [4.0, 1.0, 0.0]], dtype=torch.float64),
    total=torch.tensor([5.0, 1.0, 2.0], dtype=torch.float64),
)


def shown(table) -> list[list[str]]:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return [line.split() for line in console.export_text().splitlines()]


def test_table():
    rows = shown(importance_table(IMPORTANCE))
    # Squared norms 25, 4 and 1 of 30.
    assert ["S_SVO", "5", "83.33%", "layer.1"] in rows
    assert ["P_TONE", "2", "13.33%", "layer.0"] in rows
    assert ["S_SOV", "1", "3.33%", "layer.1"] in rows
    assert [row[0] for row in rows if row and row[0][:2] in ("S_", "P_")] == ["S_SVO", "P_TONE", "S_SOV"]
    rows = shown(importance_table(IMPORTANCE, count=1))
    assert not any("P_TONE" in row for row in rows)
    alike = FeatureImportance(["a"], ["x", "y"], torch.ones(2, 1), torch.ones(1))
    assert ["a", "1", "100.00%", "all", "layers", "alike"] in shown(importance_table(alike))


def test_top_keeps_the_order_of_equals():
    equal = FeatureImportance(["a", "b", "c"], ["x"], torch.ones(1, 3), torch.tensor([1.0, 2.0, 1.0]))
    assert equal.top() == [("b", 2.0), ("a", 1.0), ("c", 1.0)]
    assert equal.top(2) == [("b", 2.0), ("a", 1.0)]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_plot(tmp_path, ending):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"features.{ending}"
    plot_importance(IMPORTANCE, path, count=2)
    assert path.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_cannot_be_shown(tmp_path):
    with pytest.raises(ConfigError, match="count must be at least 1, got 0"):
        importance_table(IMPORTANCE, count=0)
    pytest.importorskip("matplotlib")
    (tmp_path / "kept.txt").write_text("kept")
    with pytest.raises(ConfigError, match="must end with a format that matplotlib writes"):
        plot_importance(IMPORTANCE, tmp_path / "kept.txt")
    assert (tmp_path / "kept.txt").read_text() == "kept"


def test_matplotlib_is_loaded_for_pictures_only(interpreter):
    code = (
        "import sys, peft_sparse; peft_sparse.importance_table; peft_sparse.plot_importance; "
        "assert 'matplotlib' not in sys.modules"
    )
    interpreter.run(code)

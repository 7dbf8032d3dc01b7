"""The notebook `examples/quickstart.ipynb`: well formed, and runs offline on a tiny model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.examples import EXAMPLES, save_llama_of_letters

CELLS = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_cells_compile_and_hold_no_output():
    for number, cell in enumerate(CODE):
        compile(cell, f"cell {number}", "exec")
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS if "outputs" in cell)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A copy of what the notebook needs of the examples, and a tiny Llama whose tokenizer knows letters."""
    for name in ("_data.py", "_instructions.py", "_models.py", "_readers.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    shutil.copytree(EXAMPLES / "house_style", tmp_path / "house_style")
    save_llama_of_letters(tmp_path / "model", hidden_size=32, intermediate_size=64)
    for name, value in {"MODEL": tmp_path / "model", "STEPS": 4}.items():
        monkeypatch.setenv(f"QUICKSTART_{name}", str(value))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


@pytest.mark.slow
def test_the_notebook_runs(folder, capsys):
    names: dict = {}
    for number, cell in enumerate(CODE):
        exec(compile(cell, f"cell {number}", "exec"), names)
    assert set(names["losses"]) == {"untuned", "first", "second", "both"}
    assert min(names["losses"][name] for name in ("first", "second", "both")) < names["losses"]["untuned"]
    assert "density 2.00%" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(folder / "outputs" / "quickstart" / "merged", dtype=names["DTYPE"])
    with torch.no_grad():
        assert torch.equal(merged(**names["inputs"]).logits, names["after"])

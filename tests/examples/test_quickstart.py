"""The notebook `examples/quickstart.ipynb`: well formed, and runs offline on a tiny model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"
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
    letters = ["<unk>", "<eos>", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>").save_pretrained(
        tmp_path / "model"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(letters), bos_token_id=None, eos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
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

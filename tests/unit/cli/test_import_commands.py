"""`peft-sparse import` and `peft-sparse export`: what the commands hand on, print and refuse."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from peft_sparse.checkpoints.adapter_files import read_adapter
from peft_sparse.cli import app, main


@pytest.fixture
def folder(tmp_path):
    steps = [np.int64(1), 1, 3]
    diff = {"size": torch.Size([2, 3]), "index_steps": steps, "values": torch.tensor([-0.25, 0.5, 2.0])}
    heads = {"classifier.weight": torch.ones(2, 3), "classifier.bias": torch.ones(2), "lm_head.bias": torch.ones(9)}
    (tmp_path / "sft").mkdir()
    torch.save({"diffs": {"roberta.a.weight": diff}, "abs": heads}, tmp_path / "sft" / "pytorch_diff.bin")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_import_says_what_it_made(folder):
    result = run("import", folder / "sft", "-o", folder / "out", "--base", "some/base", "--labels", "yes, no")
    assert result.exit_code == 0, result.output
    text = result.output.replace("\n", " ")
    assert "Imported 3 weights in 1 tensors (composable-sft)" in text
    assert "base model: some/base" in text
    assert "labels: yes, no" in text
    assert "heads: classifier" in text
    assert "left out: lm_head.bias (--head imports them)" in text
    assert read_adapter(folder / "out").deltas["roberta.a.weight"].indices.tolist() == [1, 3, 5]


def test_import_as_json(folder):
    result = run("import", folder / "sft", "-o", folder / "out", "--base", "b/c", "--no-head", "--json")
    found = json.loads(result.stdout)
    assert (found["num_weights"], found["heads"], found["kind"], found["lora"]) == (3, [], "composable-sft", None)
    assert found["left_out"] == ["classifier.weight", "classifier.bias", "lm_head.bias"]


def test_export_goes_back(folder):
    run("import", folder / "sft", "-o", folder / "out", "--base", "some/base")
    result = run("export", folder / "out", "--to", "composable-sft", "-o", folder / "back")
    assert result.exit_code == 0, result.output
    assert "Exported 3 weights" in result.output
    found = torch.load(folder / "back" / "pytorch_diff.bin", weights_only=True)
    assert found["diffs"]["roberta.a.weight"]["index_steps"] == [1, 1, 3]
    assert found["abs"].keys() == {"classifier.weight", "classifier.bias"}


def test_errors_are_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peft-sparse", "import", str(folder / "sft"), "-o", str(folder / "out")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert "does not say which base model it belongs to" in error
    assert "Traceback" not in error
    assert not (folder / "out").exists()
    monkeypatch.setattr(sys, "argv", ["peft-sparse", "export", str(folder), "-o", str(folder / "o"), "--to", "gguf"])
    with pytest.raises(SystemExit):
        main()
    assert "to must be one of ['composable-sft', 'shira', 'supertuning', 'lora'], got 'gguf'" in capsys.readouterr().err

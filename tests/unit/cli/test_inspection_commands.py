"""`peft-sparse inspect` and `peft-sparse plot`, as they are called."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from peft_sparse import ConfigError, FormatError, RandConfig
from peft_sparse.checkpoints import native
from peft_sparse.cli import app
from peft_sparse.core.delta import SparseDelta

QUERY = "encoder.layer.{}.attention.self.query.weight"


@pytest.fixture
def folders(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    for name, indices in {"task": [0, 3, 5], "language": [3, 5, 6, 7]}.items():
        delta = SparseDelta(torch.tensor(indices, dtype=torch.int32), torch.ones(len(indices)), (4, 4))
        deltas = {QUERY.format(0): delta, QUERY.format(1): SparseDelta.empty((4, 4))}
        (tmp_path / name).mkdir()
        save_file(native.build(deltas), tmp_path / name / native.SOURCE, metadata={"format": "pt"})
        counts = {parameter: part.count for parameter, part in deltas.items()}
        RandConfig(num_weights=len(indices), counts=counts).save_pretrained(str(tmp_path / name))
    return ["task", "language"]


def test_inspect_prints_tables(folders):
    result = CliRunner().invoke(app, ["inspect", *folders])
    assert result.exit_code == 0
    rows = {" ".join(line.split()) for line in result.output.splitlines()}
    # A uniform budget: what differs between the layers is the change.
    assert "layer 0 3 3 18.8% 1.73 ████████" in rows
    assert "layer 1 0 0 0% 0" in rows
    assert "task and language 2 66.7% 25.0% 40.0% 0% +0.577" in rows


def test_inspect_prints_json(folders):
    result = CliRunner().invoke(app, ["inspect", *folders, "--json"])
    found = json.loads(result.stdout)
    assert [adapter["total"]["count"] for adapter in found["adapters"]] == [3, 4]
    assert found["pairs"][0]["shared"] == 2
    assert json.loads(CliRunner().invoke(app, ["inspect", "task", "--json"]).stdout)["pairs"] == []


def test_plot_writes_a_file(folders, tmp_path):
    result = CliRunner().invoke(app, ["plot", *folders, "-o", "out.svg", "--kind", "overlap"])
    assert result.exit_code == 0
    assert "66.7%" in (tmp_path / "out.svg").read_text(encoding="utf-8")
    assert "Where the tuned weights lie" not in (tmp_path / "out.svg").read_text(encoding="utf-8")


def test_errors_are_those_of_the_library(folders, tmp_path, monkeypatch):
    runner = CliRunner()
    (tmp_path / "task" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert isinstance(runner.invoke(app, ["plot", "task", "-o", "out.svg"]).exception, FormatError)
    (tmp_path / "task" / "adapter_config.json").write_text('{"peft_type": 3}')
    assert isinstance(runner.invoke(app, ["inspect", "task"]).exception, FormatError)
    assert isinstance(runner.invoke(app, ["plot", "language", "-o", "out.pdf"]).exception, ConfigError)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    missing = runner.invoke(app, ["plot", "language", "-o", "out.png"]).exception
    assert isinstance(missing, ConfigError)
    assert "pip install 'peft-sparse[plots]'" in str(missing)
    assert not list(tmp_path.glob("*out*"))


def test_inspect_does_not_load_matplotlib(folders, interpreter):
    code = (
        "import sys; sys.argv = ['peft-sparse', 'inspect', 'task', 'language']\n"
        "from peft_sparse.cli import main\n"
        "try:\n    main()\nfinally:\n    print('matplotlib' in sys.modules, file=sys.stderr)"
    )
    run = interpreter.run(code)
    assert "task and language" in run.stdout
    assert run.stderr.splitlines()[-1] == "False"


@pytest.mark.parametrize("command", ["inspect", "plot"])
def test_help(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "owner/name@revision" in " ".join(result.output.replace("│", " ").split())

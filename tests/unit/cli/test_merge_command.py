"""`peft-sparse merge`: what the command hands on, prints and refuses."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch
from peft import get_peft_model
from typer.testing import CliRunner

from peft_sparse import RandConfig
from peft_sparse.checkpoints.shards import Checkpoint, ShardWriter
from peft_sparse.cli import app, main
from peft_sparse.errors import ConfigError
from tests.support.models import llama

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("merge"), llama(num_hidden_layers=1)
    model.save_pretrained(folder / "base")
    config = RandConfig(num_weights=50, init_weights=False, target_modules=["up_proj"])
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder


def run(folder, *arguments: str):
    return CliRunner().invoke(app, ["merge", str(folder / "base"), str(folder / "adapter"), *arguments])


def test_it_merges_and_says_what(folder, tmp_path):
    result = run(folder, "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert f"Merged 50 weights into 1 tensors: {tmp_path / 'out'}" in result.output.replace("\n", "")
    before, after = Checkpoint(folder / "base"), Checkpoint(tmp_path / "out")
    assert int((before.tensor(UP) != after.tensor(UP)).sum()) == 50


def test_options_arrive(folder, tmp_path):
    options = ["--weights", "-1", "--dtype", "bfloat16", "--max-shard-size", "2KB", "--overwrite"]
    result = run(folder, "-o", str(tmp_path), *options)
    assert result.exit_code == 0, result.output
    plain = run(folder, "-o", str(tmp_path / "plain"), "--weights", "1")
    assert plain.exit_code == 0, plain.output
    base, minus, plus = (Checkpoint(path).tensor(UP) for path in (folder / "base", tmp_path, tmp_path / "plain"))
    assert minus.dtype == torch.bfloat16
    torch.testing.assert_close(2 * base - plus, minus.float(), rtol=1e-2, atol=1e-2)
    assert len(Checkpoint(tmp_path).shards) > 3


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--weights", "a,b"], r"--weights must be numbers with commas between them, got 'a,b'"),
        (["--weights", "1,2"], "weights must hold one number per adapter, got 2 for 1 adapters"),
        (["--dtype", "int4"], r"dtype must be one of \['float32', 'bfloat16', 'float16'\], got 'int4'"),
        (["--max-shard-size", "24 apples"], "--max-shard-size must be a size such as 24GB, 500MB or 80GiB, got"),
        (["--max-shard-size", "0GB"], "--max-shard-size must be a size"),
    ],
)
def test_refusals(folder, tmp_path, arguments, match):
    result = run(folder, "-o", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 1
    with pytest.raises(ConfigError, match=match):
        raise result.exception
    assert not (tmp_path / "out").exists()


def test_the_command_line_gives_one_line_and_status_1(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peft-sparse", "merge", "x/y/z", str(folder), "-o", "out"])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert f"Error: '{folder}' has no adapter_config.json" in capsys.readouterr().err


def test_a_signal_that_ends_the_command_clears_up(folder, tmp_path, monkeypatch):
    def stop(writer, name, tensor):
        (writer.staging / "half").write_text("x")
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ShardWriter, "add", stop)
    arguments = ["merge", str(folder / "base"), str(folder / "adapter"), "-o", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["peft-sparse", *arguments])
    with pytest.raises(SystemExit, match="143"):
        main()
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before

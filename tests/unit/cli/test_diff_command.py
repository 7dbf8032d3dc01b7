"""`peft-sparse diff` from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peft_sparse.cli import app, main
from tests.support.checkpoints import saved_deltas
from tests.support.models import llama

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate(("base", "tuned")):
        llama(seed=seed).save_pretrained(folder / name)
    return str(folder / "base"), str(folder / "tuned")


def run(*arguments: str | Path):
    return RUNNER.invoke(app, ["diff", *map(str, arguments)], env={"COLUMNS": "140"}, catch_exceptions=False)


def counts(folder: Path) -> dict[str, int]:
    return {name: delta.count for name, delta in saved_deltas(folder / "adapter_model.safetensors").items()}


def test_the_table(pair, tmp_path):
    result = run(*pair, "--density", "0.1", "-o", tmp_path / "a")
    assert result.exit_code == 0
    total = sum(counts(tmp_path / "a").values())
    rows = {line.strip("│┃ ").split("│")[0].strip(): line for line in result.stdout.splitlines() if "%" in line}
    assert set(rows) >= {"model.layers.0", "model.layers.1", "embeddings", "attention", "feed-forward", "all"}
    assert f" {total:,} " in rows["all"]
    assert "10.0" in rows["all"]
    assert "values in float32" in result.stdout


def test_json_and_every_weight_that_differs(pair, tmp_path):
    result = run(*pair, "--changed", "--json", "-o", tmp_path / "a", "--target", "q_proj", "--target", "up_proj")
    document = json.loads(result.stdout)
    assert document["total"]["count"] == document["total"]["differing"] == sum(counts(tmp_path / "a").values())
    assert {kept["name"].split(".")[-2] for kept in document["tensors"]} == {"q_proj", "up_proj"}
    assert document["total"]["share_kept"] == pytest.approx(1.0)


def test_budget_criterion_and_dtype(pair, tmp_path):
    shares = ["--budget", r"layers\.0\.=0.25", "--budget", r"layers\.1\.=0.75"]
    denoised = ["--criterion", "denoised", "--rank", "3", "--residual-density", "0.1"]
    options = [*shares, *denoised, "--values-dtype", "bfloat16", "--target", "all-linear", "--num-weights", "100"]
    assert run(*pair, *options, "-o", tmp_path / "a").exit_code == 0
    found = counts(tmp_path / "a")
    assert sum(count for name, count in found.items() if ".layers.0." in name) == 25
    assert sum(found.values()) == 100
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["values_dtype"] == "bfloat16"
    assert config["budget"] == {r"layers\.0\.": 0.25, r"layers\.1\.": 0.75}
    assert config["provenance"]["rank"] == 3


def test_overwriting_and_leaving_out(pair, tmp_path):
    run(*pair, "--density", "0.1", "-o", tmp_path / "a")
    assert "lm_head.weight" in counts(tmp_path / "a")
    result = run(*pair, "--density", "0.1", "-o", tmp_path / "a", "--overwrite", "--exclude", "lm_head")
    assert result.exit_code == 0
    assert "lm_head.weight" not in counts(tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--density", "3"], "density must be in (0, 1], got 3.0"),
        (["--changed", "--num-weights", "3"], "give --changed or --num-weights, not both"),
        (["--density", "0.1", "--rank", "many"], "--rank must be a share"),
        (["--density", "0.1", "--budget", "a=much"], "--budget must be a name or REGEX=SHARE, got 'a=much'"),
    ],
)
def test_errors_are_one_line(pair, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["peft-sparse", "diff", *pair, *options, "-o", str(tmp_path / "a")])
    with pytest.raises(SystemExit) as exit_:
        main()
    error = capsys.readouterr().err
    assert exit_.value.code == 1
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "a").exists()

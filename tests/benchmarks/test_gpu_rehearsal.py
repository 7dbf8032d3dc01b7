"""The benchmark for GPUs, rehearsed: its rows come in their order, are right, and fit the time that is given."""

from __future__ import annotations

import json

import gpu
import pytest
from _gpu_training import METHODS

from peft_sparse.selection import rows

pytestmark = pytest.mark.filterwarnings("ignore")
FEW = ["frozen", "LoRA", "Rand, a tenth of the rows"]


@pytest.fixture(autouse=True)
def _draws(monkeypatch):
    # The benchmark remembers random draws for the length of its process.
    monkeypatch.setattr(rows, "random_indices", rows.random_indices)


def options(*arguments: str):
    return gpu.parsed(["--tiny", "--layers", "1", "--blocks", "1", *arguments])


def test_a_rehearsal():
    lines = list(gpu.run(options("--only", "correctness", "step", "gradient", "--methods", *FEW)))
    assert [json.loads(json.dumps(line)) for line in lines] == lines or all(json.dumps(line) for line in lines)
    assert not [line for line in lines if "error" in line and line.get("what") != "gradient"]
    assert all(line["ok"] for line in lines if "ok" in line)
    steps = [(line["row"], line["method"]) for line in lines if "method" in line]
    assert steps == [(row, name) for row in ("step", "step, checkpointing") for name in FEW]
    trained = {line["method"]: line["trained"] for line in lines if "method" in line}
    assert trained["LoRA"] == trained["Rand, a tenth of the rows"] == 2 * (4 * 128 + 3 * 240)
    assert trained["frozen"] == 0
    table = gpu.table(lines)
    assert table.count("\n") == 1 + len(steps)
    assert "| step | LoRA | 2,464 |" in table
    assert [row.split("|")[5].strip() for row in table.splitlines() if "| LoRA |" in row] == ["1.000", "1.000"]


def test_rows_that_would_not_fit_are_left_out():
    lines = list(gpu.run(options("--minutes", "0")))
    assert [line["row"] for line in lines] == ["environment", *(name for name, _, _ in gpu.ROWS)]
    assert all("0 s are left" in line["skipped"] for line in lines[1:])


def test_a_failure_is_a_row_and_the_others_follow(monkeypatch):
    def fails(_):
        yield {"what": "begun"}
        raise RuntimeError("no kernel image is available\nsecond line")

    monkeypatch.setattr(gpu, "ROWS", [("broken", fails, 0), ("whole", lambda _: iter([{"what": "x"}]), 0)])
    lines = list(gpu.run(options()))
    assert [line["row"] for line in lines] == ["environment", "broken", "broken", "broken", "whole", "whole"]
    assert lines[2]["error"] == "RuntimeError: no kernel image is available"


def test_everything_that_the_issue_asks_for_is_there():
    assert [name for name, _, _ in gpu.ROWS][:3] == ["correctness", "step", "step, checkpointing"]
    names = {method.name for method in METHODS}
    assert {"frozen", "LoRA", "SpIEL-AG", "SpIEL-MA", "Rand", "SHiRA", "Super-Tuning"} <= names
    # What they take at most.
    assert sum(seconds for _, _, seconds in gpu.ROWS) <= 9 * 60


def test_an_unknown_method_is_refused(capsys):
    with pytest.raises(SystemExit):
        options("--methods", "DoRA")
    assert "--methods must be of" in capsys.readouterr().err

"""The benchmark of distillation, rehearsed: what it makes and keeps, and how it compares."""

from __future__ import annotations

import json
import random

import bilingual_distillation as bench
import numpy as np
import pytest
from _paired import macro_f1, paired
from sklearn.metrics import f1_score
from transformers import AutoConfig

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
def test_a_rehearsal_keeps_what_it_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.transformers.logging, "set_verbosity_error", lambda: None)  # it would outlast the test
    output = tmp_path / "out.jsonl"
    arguments = ["--tiny", "--output", str(output), "--arms", "teacher", "TF"]
    bench.main(arguments)
    lines = [json.loads(line) for line in (tmp_path / "out_tiny.jsonl").read_text().splitlines()]
    assert [(line["arm"], line["seed"]) for line in lines] == [("teacher", 0), ("TF", 0), ("time", 0)]
    teacher, student, time = lines
    assert student["parameters"] < teacher["parameters"]
    assert {code: len(answers) for code, answers in student["answers"].items()} == {"near": 40, "far": 40}
    assert time["ratio"] > 0
    assert time["vocabulary"]["test rows cut alike"] == {"near": 1.0, "far": 1.0}
    (folder,) = (tmp_path / "out_tiny").iterdir()
    layers = {
        name: AutoConfig.from_pretrained(folder / name).num_hidden_layers for name in ("base", "general-copied-0")
    }
    assert layers == {"base": 2, "general-copied-0": 1}
    assert (folder / "language-near" / "adapter_config.json").is_file()
    shown = capsys.readouterr().out
    assert "teacher - TF" in shown
    assert "0.4 to 1.3" in shown

    def nothing(*args, **kwargs):
        raise AssertionError("it was there already")

    # A run that was killed after the teacher: the line of the student is made anew, of the models that are there.
    (tmp_path / "out_tiny.jsonl").write_text(json.dumps(teacher) + '\n{"arm": "TF", "se')
    monkeypatch.setattr(bench.Workshop, "task", nothing)
    monkeypatch.setattr(bench.Workshop, "language", nothing)
    monkeypatch.setattr(bench.Bench, "_distil", nothing)
    bench.main(arguments)
    again = [json.loads(line) for line in (tmp_path / "out_tiny.jsonl").read_text().splitlines() if "settings" in line]
    assert [line["arm"] for line in again] == ["teacher", "TF", "time"]
    assert again[1]["answers"] == student["answers"]


def test_pairs_name_arms_that_there_are():
    assert all({one, other} <= set(bench.ARMS) for one, other, _ in bench.PAIRS)


def answers(seed: int, truth: list[str], right: float) -> list[str]:
    chance = random.Random(seed)
    return [label if chance.random() < right else chance.choice("abc") for label in truth]


def test_scores_are_scikit_learns():
    truth = [*"abcabcaabbcccccca"]
    given = answers(0, truth, 0.5)
    numbers = [np.array([*map("abc".index, labels)]) for labels in (truth, given)]
    drawn = np.random.default_rng(0).integers(len(truth), size=(20, len(truth)))
    found = macro_f1(*numbers, drawn)
    for rows, score in zip(drawn, found, strict=True):
        parts = [[labels[i] for i in rows] for labels in (truth, given)]
        assert score == pytest.approx(f1_score(*parts, average="macro"))


def test_a_clear_difference_is_confirmed_or_refuted_and_a_small_one_open():
    truth = answers(9, ["a"] * 300, 0.0)
    good, bad = ([answers(seed, truth, right) for seed in (0, 1, 2)] for right in (0.8, 0.4))
    found = paired(truth, good, bad, resamples=300)
    each = [
        100 * (f1_score(truth, a, average="macro") - f1_score(truth, b, average="macro"))
        for a, b in zip(good, bad, strict=True)
    ]
    assert found.by_seed == pytest.approx(each)
    assert found.mean == pytest.approx(np.mean(each))
    assert found.low < found.mean < found.high
    assert found.verdict == "confirmed"
    assert paired(truth, bad, good, resamples=300).verdict == "refuted"
    alike = paired(truth, good, good[1:] + good[:1], resamples=300)
    assert alike.mean == pytest.approx(0, abs=1e-9)
    assert alike.verdict == "open"

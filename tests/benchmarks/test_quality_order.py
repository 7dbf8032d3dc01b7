"""Which runs of the quality benchmark come first, and that runs of another machine count."""

from __future__ import annotations

import json

import instruction_quality as quality
import pytest
from _bench_runs import Results
from _quality_methods import Method
from _quality_runs import table, wanted

METHODS = {name: Method(rates, lambda run: None) for name, rates in {"lora": (2, 1, 4), "rand": (8, 4, 16)}.items()}
FIELDS = ("method", "learning_rate", "seed")


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "runs.jsonl", FIELDS, lambda name: {"data": 1})


def add(results, method, rate, seed, loss=1.0):
    found = {"loss": loss, "rows": [[loss, 1], [loss + 0.1, 1]], "trained": 5, "seconds": 1.0}
    results.add({**dict(zip(FIELDS, (method, rate, seed), strict=True)), **found})


def test_all_seeds_come_first_and_then_the_bracket(results):
    def now():
        return wanted(METHODS, [0, 1, 2], results, seeds_first=True)

    firsts = [("lora", 2, 0), ("rand", 8, 0)]
    seeds = [("lora", 2, 1), ("rand", 8, 1), ("lora", 2, 2), ("rand", 8, 2)]
    others = [("lora", 1, 0), ("rand", 4, 0), ("lora", 4, 0), ("rand", 16, 0)]
    assert now() == [("untuned", 0.0, 0), *firsts, *seeds, *others]
    for run in [("untuned", 0.0, 0), *firsts, seeds[0]]:
        add(results, *run)
    assert now() == [*seeds[1:], *others]
    for run in [*seeds[1:], *others]:
        add(results, *run, loss=0.5 if run == ("rand", 16, 0) else 1.0 if run[1] in (2, 8) else 1.5)
    # The first seed's best lies at an end: one rate beyond it. Other seeds stay at the first rates.
    assert now() == [("rand", 32, 0)]


def test_without_it_other_seeds_wait_for_the_best_rate(results):
    for run in (("untuned", 0.0, 0), ("lora", 2, 0), ("lora", 4, 0)):
        add(results, *run)
    add(results, "lora", 1, 0, loss=0.5)
    runs = wanted({"lora": METHODS["lora"]}, [0, 1], results)
    assert runs == [("lora", 0.5, 0)]
    add(results, "lora", 0.5, 0)
    assert wanted({"lora": METHODS["lora"]}, [0, 1], results) == [("lora", 1, 1)]


def test_the_table_shows_first_rates_where_all_seeds_ran_at_them(results):
    for seed in (0, 1):
        add(results, "lora", 2, seed, loss=1.0)
        add(results, "rand", 8, seed, loss=1.25)
    add(results, "rand", 4, 0, loss=0.5)

    def columns(*arguments: str) -> dict[str, list]:
        options = quality.parse([*arguments, "--seeds", "0", "1"])
        return {column.header: list(column.cells) for column in table(METHODS, results, options, "x").columns}

    first = columns("--seeds-first")
    assert first["method"] == ["lora", "rand"]
    assert first["learning rate"] == ["2", "8"]
    assert first["seeds"] == ["2", "2"]
    assert first["- LoRA"][1].startswith("+0.2500 (0.0000")
    best = columns()
    assert best["method"] == ["rand", "lora"]
    assert best["learning rate"] == ["4", "2"]


def test_two_data_sets_take_turns_and_share_a_file(tmp_path):
    path = tmp_path / "runs.jsonl"
    works = [
        quality.Work(name, METHODS, Results(path, FIELDS, lambda _, number=number: {"data": number}), None)
        for number, name in enumerate(["gsm8k", "alpaca"])
    ]
    add(works[0].results, "untuned", 0.0, 0)
    options = quality.parse(["--verdict", "--data", "gsm8k", "alpaca"])
    found = [(work.name, run) for work, run in quality.waiting(works, options)]
    assert found[:4] == [
        ("gsm8k", ("lora", 2, 0)),
        ("alpaca", ("untuned", 0.0, 0)),
        ("gsm8k", ("rand", 8, 0)),
        ("alpaca", ("lora", 2, 0)),
    ]
    again = Results(path, FIELDS, lambda _: {"data": 0})
    assert again.get("untuned", 0.0, 0) is not None
    assert Results(path, FIELDS, lambda _: {"data": 1}).get("untuned", 0.0, 0) is None


def test_the_verdict_has_the_settings_of_the_published_rows(monkeypatch):
    # On a GPU, as they were measured; rows in float32 are others.
    monkeypatch.setattr(quality, "FAST_BFLOAT16", True)
    options = quality.parse(["--verdict"])
    settings = quality.settings_of(options, 4267800717)
    model = {"model": "smollm2", "data": 4267800717}
    common = {**model, "steps": 400, "batch_size": 8, "density": 0.02}
    assert settings("untuned") == model
    assert settings("lora") == settings("rand") == common
    assert settings("one_shot_fitted") == {**common, "selection_batches": 8}
    calendar = {"reselection_steps": 20, "estimation_steps": 5}
    assert settings("spiel_ag_mended_fitted") == {**common, **calendar, "selection_batches": 8}
    assert json.loads(json.dumps(settings("lora"))) == settings("lora")
    monkeypatch.setattr(quality, "FAST_BFLOAT16", False)
    assert settings("lora") == {**common, "dtype": "float32"}
    assert options.methods[0] == "lora"
    assert (options.seeds, options.seeds_first) == ([0, 1, 2], True)
    assert quality.parse(["--verdict", "--methods", "rand", "--steps", "9"]).methods == ["rand"]

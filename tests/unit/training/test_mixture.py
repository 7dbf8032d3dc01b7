"""Sources that are mixed: their shares, exact and drawn, what the log says of them, and few-shot rows."""

from __future__ import annotations

import logging
import pickle
from collections import Counter

import pytest
import torch
from datasets import Dataset

from peft_sparse import (
    ConfigError,
    LanguageSwitch,
    MultiSourceCollator,
    MultiSourceDataset,
    Source,
    batches_of_an_epoch,
    few_shot,
    language_below_task,
)
from tests.support.languages import make_languages_and_task, make_sources, stack


def rows(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


def sources() -> dict[str, Source]:
    return {
        "ind": Source(rows(103), "ind"),
        "ace gold": Source(rows(9, 1000), "ace", upsampling=10),
        "ace nllb": Source(rows(50, 2000), "ace", origin="translated"),
    }


def made(**changes) -> MultiSourceDataset:
    return MultiSourceDataset(
        sources(), **{"num_batches": 500, "batch_size": 4, "exponent": 1.0, "draw": "exact", **changes}
    )


# Of chapter 6: upsampling * ceil(examples / batch).
EPOCH = {"ind": 26, "ace gold": 30, "ace nllb": 13}


def test_an_epoch_has_the_batches_of_the_thesis():
    assert batches_of_an_epoch(sources(), batch_size=4) == EPOCH
    batches = made(num_batches=3 * 69 + 20)
    for epoch in range(3):
        drawn = batches.schedule[69 * epoch : 69 * (epoch + 1)].tolist()
        assert Counter(batches.names[place] for place in drawn) == EPOCH
    assert batches.schedule[:69].tolist() != batches.schedule[69:138].tolist()
    assert batches.probabilities == {name: count / 69 for name, count in EPOCH.items()}
    assert sum(batches.counts.values()) == len(batches) == 227


def test_independent_draws_have_the_shares_in_the_mean():
    batches = made(draw="independent", num_batches=20_000)
    weights = {"ind": 103, "ace gold": 90, "ace nllb": 50}
    for name, weight in weights.items():
        assert batches.probabilities[name] == pytest.approx(weight / 243)
        assert batches.counts[name] / 20_000 == pytest.approx(weight / 243, abs=5 * (0.25 / 20_000) ** 0.5)
    smoothed = made(draw="independent", exponent=0.5, cap=64)
    weights = {"ind": 64**0.5, "ace gold": 10 * 9**0.5, "ace nllb": 50**0.5}
    assert smoothed.probabilities == pytest.approx({n: w / sum(weights.values()) for n, w in weights.items()})


@pytest.mark.parametrize("draw", ["exact", "independent"])
def test_batches_hold_their_sources_examples_each_once_before_any_comes_again(draw):
    batches = made(draw=draw)
    seen: dict[str, list[int]] = {name: [] for name in batches.names}
    for item in range(len(batches)):
        batch = batches[item]
        assert (batch.source, str(batch.language)) in [("ind", "ind"), ("ace gold", "ace"), ("ace nllb", "ace")]
        seen[batch.source] += batch.examples
    for name, source in sources().items():
        size = len(source.examples)
        for turn in range(len(seen[name]) // size):
            assert sorted(seen[name][turn * size : (turn + 1) * size]) == source.examples
    assert batches.languages == ("ind", "ace")


def test_the_log_says_what_the_mixture_comes_to(caplog):
    with caplog.at_level(logging.INFO, "peft_sparse"):
        made(num_batches=69)
    assert "ace gold (ace, gold): 9 examples, upsampling 10, 30 of 69 batches, each example 13.33 times" in caplog.text
    assert "ace nllb (ace, translated): 50 examples, upsampling 1, 13 of 69 batches" in caplog.text


def test_a_switch_counts_languages_and_sources_and_a_language_may_have_no_adapter():
    examples = make_sources()
    mixed = {"eng": Source(examples["eng"], "eng"), "quy mt": Source(examples["quy"], "quy", origin="translated")}
    batches = MultiSourceDataset(mixed, num_batches=8, batch_size=2, draw="exact")
    collate = MultiSourceCollator(stack)
    items = [pickle.loads(pickle.dumps(collate([batches[i]]))) for i in range(8)]
    assert {(item["language"], getattr(item["language"], "source", None)) for item in items} == {
        ("eng", None),
        ("quy", "quy mt"),
    }
    model = make_languages_and_task()
    activate = language_below_task({"eng": "eng-adapter", "quy": None}, "task")
    switch = LanguageSwitch(model, batches.languages, activate=activate, sources=batches.names)
    for item in items:
        model(**item).loss.backward()
        assert model.active_adapters == (["eng-adapter", "task"] if item["language"] == "eng" else ["task"])
        assert all(".task" in name for name, p in model.named_parameters() if p.requires_grad)
    assert switch.counts == {
        "eng": batches.counts["eng"],
        "quy": batches.counts["quy mt"],
        "quy mt": switch.counts["quy"],
    }


def test_few_rows_are_drawn_by_a_seed_and_smaller_draws_are_inside_larger_ones():
    found = {k: few_shot(rows(100), k, seed=1) for k in (5, 20, 100)}
    assert found[100] == rows(100)
    assert set(found[5]) < set(found[20])
    assert found[20] == sorted(found[20]) != rows(20)
    assert few_shot(rows(100), 20, seed=1) == found[20] != few_shot(rows(100), 20, seed=2)


def test_few_rows_have_the_shares_of_their_classes():
    labelled = [{"label": "a" if i % 4 else "b", "i": i} for i in range(80)]
    of_ten = Counter(row["label"] for row in few_shot(labelled, 10, seed=0, stratify="label"))
    assert of_ten in ({"a": 8, "b": 2}, {"a": 7, "b": 3})  # 7.5 and 2.5
    assert Counter(row["label"] for row in few_shot(labelled, 20, seed=0, stratify="label")) == {"a": 15, "b": 5}
    data = few_shot(Dataset.from_list(labelled), 4, seed=0, stratify="label")
    assert isinstance(data, Dataset)
    assert Counter(data["label"]) == {"a": 3, "b": 1}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: few_shot(rows(7), 8), "k must be in 1..7, the number of rows there are, got 8"),
        (lambda: few_shot(rows(7), 0), "k must be in 1..7"),
        (lambda: few_shot([{"label": 1}, {"labl": 1}], 1, stratify="label"), "stratify: row 1 has no field 'label'"),
        (lambda: Source(rows(2), "ace", upsampling=0), "upsampling must be a number above 0, got 0"),
        (lambda: Source(rows(2), ""), "language must be the code"),
        (lambda: made(draw="shuffled"), r"draw must be one of \['independent', 'exact'\], got 'shuffled'"),
        (lambda: batches_of_an_epoch({"a": []}, batch_size=2), "at least one example"),
        (lambda: batches_of_an_epoch({"a": [1]}, batch_size=0), "batch_size must be >= 1"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_an_item_depends_on_its_number_alone():
    one, other = made(), made()
    order = torch.randperm(len(one), generator=torch.Generator().manual_seed(5)).tolist()
    assert {item: one[item] for item in order} == {item: other[item] for item in range(len(other))}

"""Batches of one language each: probabilities, orders, seeds, what is refused."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

from peft_sparse import ConfigError, MultiSourceCollator, MultiSourceDataset, Source, evaluation_batches
from peft_sparse.training.languages.multisource import LanguageBatch, sampling_probabilities
from tests.support.languages import make_sources, stack
from tests.support.tokenizers import of_words


def made(**changes) -> MultiSourceDataset:
    return MultiSourceDataset(make_sources(), **{"num_batches": 40, "batch_size": 4, "seed": 3, **changes})


def rows_of(batch: LanguageBatch) -> list[int]:
    return [int(example["input_ids"][2]) for example in batch.examples]


def test_probabilities_of_the_thesis():
    found = sampling_probabilities({"eng": 6_000_000, "ind": 500_000, "quy": 20_000})
    root = [500_000**0.5, 500_000**0.5, 20_000**0.5]
    assert list(found.values()) == pytest.approx([part / sum(root) for part in root])
    assert sampling_probabilities({"a": 9, "b": 4}, cap=4, exponent=1) == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": {}}, "every language must have at least one example, got {}"),
        ({"sizes": {"a": 1, "b": 0}}, "every language must have at least one example, got {'a': 1, 'b': 0}"),
        ({"sizes": {"a": 1}, "cap": 0}, "cap must be >= 1 examples, got 0"),
        ({"sizes": {"a": 1}, "exponent": 1.5}, r"exponent must be in \[0, 1\], got 1.5"),
        ({"sizes": {"ace": 1}, "upsampling": {"acee": 2}}, r"names 'acee', which is none of .*Did you mean 'ace'"),
        ({"sizes": {"a": 1}, "upsampling": {"a": -1}}, "upsampling of 'a' must be a number above 0, got -1"),
    ],
)
def test_probabilities_that_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        sampling_probabilities(**arguments)


@pytest.mark.parametrize("name", ["num_batches", "batch_size"])
def test_numbers_that_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} must be >= 1, got 0"):
        made(**{name: 0})


def test_languages_are_drawn_by_their_probabilities():
    batches = made(num_batches=20_000)
    assert batches.counts == dict(sorted(Counter(batches.languages[i] for i in batches.schedule).items()))
    for language, probability in batches.probabilities.items():
        # Five standard deviations of a binomial share.
        assert batches.counts[language] / 20_000 == pytest.approx(probability, abs=5 * (0.25 / 20_000) ** 0.5)


def test_every_batch_is_of_one_language():
    for place, batch in zip(made().schedule.tolist(), (made()[i] for i in range(40)), strict=True):
        assert batch.language == list(make_sources())[place]
        assert {int(example["input_ids"][1]) for example in batch.examples} == {place}
        assert len(batch.examples) == 4


def test_a_language_comes_whole_before_it_comes_again():
    batches = made(num_batches=200)
    for place, (language, rows) in enumerate(make_sources().items()):
        drawn = [row for item in range(200) if batches.schedule[item] == place for row in rows_of(batches[item])]
        passes = [drawn[first : first + len(rows)] for first in range(0, len(drawn) - len(rows) + 1, len(rows))]
        assert len(passes) > 5, language
        assert all(sorted(one) == list(range(len(rows))) for one in passes)
        assert len({tuple(one) for one in passes}) > 1


def test_an_item_depends_on_its_number_alone():
    batches, order = made(), torch.randperm(40).tolist()
    shuffled = {item: batches[item] for item in order}
    again = made()
    for item in range(40):
        assert (shuffled[item].language, shuffled[item].seed) == (again[item].language, again[item].seed)
        assert rows_of(shuffled[item]) == rows_of(again[item])
    assert len({batches[item].seed for item in range(40)}) == 40
    assert made(seed=4).schedule.tolist() != again.schedule.tolist()
    assert batches[-1].seed == batches[39].seed
    with pytest.raises(IndexError):
        batches[40]


def test_a_loader_with_workers_gives_the_same():
    def load(workers: int) -> list:
        torch.manual_seed(5)
        return list(DataLoader(made(num_batches=9), collate_fn=MultiSourceCollator(stack), num_workers=workers))

    for found, expected in zip(load(2), load(0), strict=True):
        assert found.keys() == expected.keys() == {"input_ids", "labels", "attention_mask", "language"}
        assert found["language"] == expected["language"]
        assert torch.equal(found["input_ids"], expected["input_ids"])
        assert torch.equal(found["attention_mask"], expected["attention_mask"])


def test_collating_leaves_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    collate = MultiSourceCollator(stack)
    first = collate([made()[0]])
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(collate([made()[0]])["attention_mask"], first["attention_mask"])
    other = next(item for item in range(1, 40) if made()[item].language == made()[0].language)
    assert not torch.equal(collate([made()[other]])["attention_mask"], first["attention_mask"])


def test_a_failing_collator_leaves_the_random_state_alone():
    def fail(examples):
        torch.rand(1)
        raise KeyError("labels")

    before = torch.get_rng_state()
    with pytest.raises(KeyError, match="labels"):
        MultiSourceCollator(fail)([made()[0]])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("items", [[], [0, 1], ["row"]])
def test_what_is_not_one_batch_is_refused(items):
    batches = made()
    items = [batches[item] if isinstance(item, int) else item for item in items]
    with pytest.raises(ConfigError, match=f"one LanguageBatch, .*batch_size=1 .*evaluation_batches. Got {len(items)}"):
        MultiSourceCollator(stack)(items)


def test_evaluation_sees_every_row_once():
    batches = evaluation_batches(make_sources(), batch_size=5)
    assert [(batch.language, rows_of(batch)) for batch in batches] == [
        ("eng", [0, 1, 2, 3, 4]),
        ("eng", [5, 6, 7, 8, 9]),
        ("eng", [10, 11]),
        ("ind", [0, 1, 2, 3, 4]),
        ("quy", [0, 1, 2]),
    ]
    assert len({batch.seed for batch in batches}) == 5
    assert [b.seed for b in evaluation_batches(make_sources(), batch_size=5)] == [b.seed for b in batches]
    with pytest.raises(ConfigError, match="batch_size must be >= 1, got 0"):
        evaluation_batches(make_sources(), batch_size=0)
    with pytest.raises(ConfigError, match=r"every language must have at least one example, got .*'jav': 0"):
        evaluation_batches({**make_sources(), "jav": []}, batch_size=5)
    of_source = evaluation_batches({"gold": Source(make_sources()["ind"], "ind")}, batch_size=5)
    assert [(batch.language, rows_of(batch)) for batch in of_source] == [("ind", [0, 1, 2, 3, 4])]


def test_masked_language_modelling():
    tokenizer = of_words(["[PAD]", "[MASK]", "[UNK]", *(f"w{i}" for i in range(3, 40))], unk="[UNK]")
    rows = [{"input_ids": [2 + (i + j) % 38 for j in range(20 + i)]} for i in range(6)]
    batches = MultiSourceDataset({"eng": rows}, num_batches=2, batch_size=6)
    batch = MultiSourceCollator(DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5))([batches[0]])
    assert batch["input_ids"].shape == batch["labels"].shape == (6, 25)
    masked = batch["labels"] != -100
    assert 0.3 < masked.float().mean() < 0.6
    assert (batch["input_ids"][masked] == 1).float().mean() > 0.6
    assert batch["language"] == "eng"

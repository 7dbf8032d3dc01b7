"""Multi-source batches: what holds for any sizes, settings, processes and interruptions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from peft_sparse import MultiSourceDataset
from peft_sparse.training.languages.multisource import sampling_probabilities
from tests.support.laws import examples

sizes_ = st.lists(st.integers(1, 30), min_size=1, max_size=5).map(
    lambda found: {f"l{i}": n for i, n in enumerate(found)}
)


@st.composite
def datasets(draw: st.DrawFn) -> MultiSourceDataset:
    sources = {language: [(language, row) for row in range(size)] for language, size in draw(sizes_).items()}
    numbers = {"num_batches": draw(st.integers(1, 25)), "batch_size": draw(st.integers(1, 7))}
    return MultiSourceDataset(sources, **numbers, cap=draw(st.integers(1, 40)), seed=draw(st.integers(0, 2**40)))


@examples(100)
@given(st.dictionaries(st.text(max_size=3), st.integers(1, 10**7), min_size=1), st.integers(1, 10**7), st.floats(0, 1))
def test_probabilities_are_those_of_the_formula(sizes, cap, exponent):
    found = sampling_probabilities(sizes, cap=cap, exponent=exponent)
    assert found.keys() == sizes.keys()
    assert sum(found.values()) == pytest.approx(1)
    (first, *_), largest = sizes, max(found.values())
    for language, size in sizes.items():
        ratio = float(Fraction(min(size, cap), min(sizes[first], cap))) ** exponent
        assert found[language] / found[first] == pytest.approx(ratio, rel=1e-9)
    assert all(found[language] == largest for language, size in sizes.items() if size >= cap)


@examples(90)
@given(datasets())
def test_batches_are_whole_and_of_one_language(batches):
    drawn: dict[str, list[int]] = {language: [] for language in batches.languages}
    for item in range(len(batches)):
        batch = batches[item]
        assert {language for language, _ in batch.examples} == {batch.language}
        assert len(batch.examples) == batches.batch_size
        drawn[batch.language] += [row for _, row in batch.examples]
    for language, rows in drawn.items():
        assert len(rows) == batches.counts[language] * batches.batch_size
        times = torch.bincount(torch.tensor(rows, dtype=torch.long), minlength=len(batches.sources[language]))
        assert int(times.max() - times.min()) <= 1


@examples(90)
@given(datasets(), st.integers(2, 4), st.integers(0, 1000))
def test_processes_share_batches_out_and_tear_none(batches, world, seed):
    def items(rank: int) -> list[int]:
        sampler = RandomSampler(batches, generator=torch.Generator().manual_seed(seed))
        return [item for (item,) in BatchSamplerShard(BatchSampler(sampler, 1, False), world, rank)]

    ranks = [items(rank) for rank in range(world)]
    assert len({len(found) for found in ranks}) == 1
    together = [item for step in zip(*ranks, strict=True) for item in step]
    assert sorted(together[: len(batches)]) == list(range(len(batches)))  # what follows fills the last step up


@examples(60)
@given(datasets(), st.integers(0, 1000), st.data())
def test_skipping_is_exact(batches, seed, data):
    skipped = data.draw(st.integers(0, len(batches)))

    def loader() -> DataLoader:
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(batches, batch_size=1, shuffle=True, collate_fn=lambda items: items[0], generator=generator)

    whole = list(loader())
    assert list(skip_first_batches(loader(), skipped)) == whole[skipped:]

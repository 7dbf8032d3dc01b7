"""Laws of overlap and interference, and both against dense float64 tensors."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse.composition.overlap import interference, overlap
from peft_sparse.core.delta import SparseDelta
from tests.support.laws import examples

SHAPES = {"a": (3, 4), "b": (7,), "c": (2, 2)}


@st.composite
def adapters(draw) -> dict[str, SparseDelta]:
    """Some of the parameters, each with any support; values are multiples of 1/4, so that sums are exact."""
    deltas = {}
    for name in draw(st.sets(st.sampled_from(sorted(SHAPES)))):
        numel = SparseDelta.empty(SHAPES[name]).numel
        entries = draw(st.dictionaries(st.integers(0, numel - 1), st.integers(-8, 8)))
        indices = sorted(entries)
        values = torch.tensor([entries[i] / 4 for i in indices], dtype=torch.float32)
        deltas[name] = SparseDelta(torch.tensor(indices, dtype=torch.int32), values, SHAPES[name])
    return deltas


def dense(deltas: dict[str, SparseDelta]) -> tuple[torch.Tensor, torch.Tensor]:
    """All parameters in a row: the change of each weight, and whether it is tuned."""
    filled = [deltas.get(name, SparseDelta.empty(shape)) for name, shape in SHAPES.items()]
    change = torch.cat([part.to_dense(dtype=torch.float64).flatten() for part in filled])
    masks = [SparseDelta(part.indices, torch.ones(part.count), part.shape).to_dense().flatten() for part in filled]
    return change, torch.cat(masks).bool()


@given(adapters(), adapters())
def test_overlap_is_that_of_dense_tensors(first, second):
    (a, in_a), (b, in_b) = dense(first), dense(second)
    found = overlap(first, second)
    assert found.counts == (int(in_a.sum()), int(in_b.sum()))
    assert found.shared == int((in_a & in_b).sum())
    assert found.opposite == int((a * b < 0).sum())
    assert found.dot == float(a @ b)
    assert found.squares == (float(a @ a), float(b @ b))
    if found.cosine is not None:
        assert found.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-12)


@given(adapters(), adapters())
def test_overlap_is_symmetric_and_bounded(first, second):
    there, back = overlap(first, second), overlap(second, first)
    for name in ("share", "chance", "jaccard", "opposite_share", "cosine", "shared", "opposite", "tensors"):
        assert getattr(there, name) == getattr(back, name)
    assert there.cosine is None or -1 <= there.cosine <= 1
    for value in (there.share, there.chance, there.jaccard, there.opposite_share):
        assert value is None or 0 <= value <= 1
    if there.share is not None:
        assert there.jaccard <= there.share


@given(adapters())
def test_an_adapter_overlaps_itself_whole(adapter):
    found = overlap(adapter, adapter)
    assert found.shared == found.counts[0]
    assert found.opposite == 0
    assert found.cosine is None or found.cosine == pytest.approx(1)


@examples(24)
@given(st.integers(0, 2**32 - 1), st.integers(1, 399), st.integers(1, 399))
def test_random_supports_overlap_as_chance_says(seed, count_a, count_b):
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> dict[str, SparseDelta]:
        indices = torch.randperm(400, generator=generator)[:count].sort().values.int()
        return {"a": SparseDelta(indices, torch.ones(count), (20, 20))}

    draws = 100
    mean = sum(overlap(draw(count_a), draw(count_b)).shared for _ in range(draws)) / draws
    expected = overlap(draw(count_a), draw(count_b)).expected
    variance = expected * (1 - count_a / 400) * (400 - count_b) / 399  # hypergeometric
    assert abs(mean - expected) <= 6 * sqrt(variance / draws) + 1e-9


@given(st.lists(adapters(), min_size=2, max_size=4), st.data())
def test_interference_is_that_of_dense_tensors_in_any_order(parts, data):
    weights = [data.draw(st.sampled_from([-1.0, 0.5, 1.0, 2.0])) for _ in parts]
    changes = torch.stack([dense(part)[0] * weight for part, weight in zip(parts, weights, strict=True)])
    tuned = torch.stack([dense(part)[1] for part in parts]).sum(0)
    found = interference(parts, weights)
    assert (found.count, found.shared) == (int((tuned > 0).sum()), int((tuned > 1).sum()))
    assert found.change == float(changes.abs().sum())
    assert found.undone == float(changes.abs().sum() - changes.sum(0).abs().sum())
    assert found.sum_square == float(changes.sum(0).square().sum())
    assert found.opposite == int(((changes > 0).any(0) & (changes < 0).any(0)).sum())

    order = data.draw(st.permutations(range(len(parts))))
    other = interference([parts[i] for i in order], [weights[i] for i in order])
    assert other.squares == tuple(found.squares[i] for i in order)
    for name in ("count", "shared", "opposite", "change", "undone", "undone_square", "sum_square"):
        assert getattr(other, name) == getattr(found, name)
    assert found.cancelled is None or 0 <= found.cancelled <= 1
    assert found.gain is None or 0 <= found.gain <= sqrt(len(parts)) + 1e-12


@given(st.lists(adapters(), min_size=2, max_size=3))
def test_sums_over_tensors_add_up(parts):
    def only(name: str) -> list[dict[str, SparseDelta]]:
        return [{name: part[name]} if name in part else {} for part in parts]

    per_tensor = [interference(only(name)) for name in SHAPES]
    assert per_tensor[0] + per_tensor[1] + per_tensor[2] == interference(parts)
    pairs = [overlap(*only(name)[:2]) for name in SHAPES]
    whole = overlap(*parts[:2])
    assert (pairs[0] + pairs[1] + pairs[2]).expected == pytest.approx(whole.expected)
    assert (pairs[0] + pairs[1] + pairs[2]).squares == whole.squares

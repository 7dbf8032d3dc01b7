"""Overlap and interference against numbers worked out by hand."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from peft_sparse.composition.overlap import Interference, Overlap, interference, overlap
from peft_sparse.core.delta import SparseDelta
from peft_sparse.errors import ConfigError


def delta(entries: dict[int, float], shape: tuple[int, ...]) -> SparseDelta:
    indices = torch.tensor(sorted(entries), dtype=torch.int32)
    return SparseDelta(indices, torch.tensor([entries[i] for i in sorted(entries)]), shape)


FIRST = {
    "a": delta({0: 3.0, 1: 4.0, 5: 0.0}, (4, 3)),
    "b": delta({0: 1.0, 3: -2.0}, (2, 2)),
    "c": delta({7: 0.5}, (2, 4)),
}
SECOND = {
    "b": delta({0: -1.0, 1: 2.0, 3: -1.0}, (2, 2)),
    "c": delta({7: 0.5}, (2, 4)),
    "d": delta({1: 12.0}, (2,)),
}


def test_overlap_by_hand():
    found = overlap(FIRST, SECOND)
    assert found == Overlap(
        counts=(6, 5),
        shared=3,
        expected=2 * 3 / 4 + 1 / 8,
        opposite=1,
        dot=1.25,
        squares=(30.25, 150.25),
        tensors=2,
    )
    assert found.share == 3 / 5
    assert found.jaccard == 3 / 8
    assert found.chance == pytest.approx(1.625 / 5)
    assert found.opposite_share == 1 / 3
    assert found.cosine == pytest.approx(1.25 / (5.5 * sqrt(150.25)))


def test_a_change_of_zero_is_shared_but_never_opposite():
    found = overlap({"a": delta({1: 0.0, 2: -1.0}, (4,))}, {"a": delta({1: 5.0, 2: 1.0}, (4,))})
    assert (found.shared, found.opposite) == (2, 1)
    assert interference([{"a": delta({1: 0.0}, (4,))}, {"a": delta({1: 5.0}, (4,))}]).opposite == 0


def test_what_cannot_be_said_is_none():
    nothing, zero = {"a": SparseDelta.empty((4,))}, {"a": delta({1: 0.0}, (4,))}
    found = overlap(nothing, zero)
    assert (found.share, found.chance, found.opposite_share, found.cosine) == (None, None, None, None)
    assert found.jaccard == 0
    assert overlap(nothing, nothing).jaccard is None
    assert overlap({}, {}) == Overlap()
    assert interference([nothing, zero]).cancelled is None
    assert interference([nothing, nothing]).gain is None


def test_interference_by_hand():
    found = interference([FIRST, SECOND])
    assert found == Interference(
        count=8,
        shared=3,
        opposite=1,
        change=7 + 7 + 1 + 12,
        undone=2.0,
        undone_square=1.0,
        sum_square=25 + 13 + 1 + 144,
        squares=(30.25, 150.25),
    )
    assert found.shared_share == 3 / 8
    assert found.opposite_share == 1 / 3
    assert found.cancelled == 2 / 27
    assert found.norm == 1
    assert found.gain == pytest.approx(sqrt(183 / 180.5))


def test_interference_of_weighted_adapters():
    found = interference([FIRST, SECOND], [1.0, -1.0])
    # b[0]: 1 + 1; b[3]: -2 + 1; c[7]: 0.5 - 0.5
    assert (found.opposite, found.undone, found.undone_square) == (2, 3.0, 1.25)
    assert interference([FIRST, SECOND], [0.0, 2.0]).squares == (0.0, 4 * 150.25)


def test_three_adapters_one_against_two():
    parts = [{"a": delta({0: value}, (1,))} for value in (1.0, 2.0, -1.5)]
    found = interference(parts)
    assert (found.count, found.shared, found.opposite) == (1, 1, 1)
    assert found.norm == 1.5
    assert found.cancelled == 3.0 / 4.5
    assert found.gain == pytest.approx(1.5 / sqrt(1 + 4 + 2.25))


def test_an_adapter_and_its_opposite_leave_nothing():
    other = {name: SparseDelta(part.indices, -part.values, part.shape) for name, part in FIRST.items()}
    found = interference([FIRST, other])
    assert (found.cancelled, found.gain) == (1.0, 0.0)
    assert overlap(FIRST, other).cosine == -1.0


def test_large_indices_are_compared_in_their_own_dtype():
    shape = (2**16, 2**16)
    high = SparseDelta(torch.tensor([5, 2**32 - 1]), torch.ones(2), shape)
    low = SparseDelta(torch.tensor([2**32 - 1]), torch.ones(1), shape)
    assert overlap({"a": high}, {"a": low}).shared == 1
    assert interference([{"a": high}, {"a": low}]).shared == 1


def test_bfloat16_values_are_summed_in_float64():
    values = torch.tensor([1.0, 2**-9]).bfloat16()
    part = {"a": SparseDelta(torch.tensor([0, 1], dtype=torch.int32), values, (2,))}
    assert overlap(part, part).dot == 1 + 2**-18


def test_adapters_of_different_models_are_refused():
    wrong = {"b": delta({0: 1.0}, (4,))}
    with pytest.raises(ConfigError, match=r"'b' has the shapes \[\(2, 2\), \(4,\)\] .* different base models"):
        overlap(FIRST, wrong)
    with pytest.raises(ConfigError, match="different base models"):
        interference([FIRST, wrong])


def test_weights_must_be_one_per_adapter():
    with pytest.raises(ConfigError, match="one number per adapter, got 1 for 2"):
        interference([FIRST, SECOND], [1.0])

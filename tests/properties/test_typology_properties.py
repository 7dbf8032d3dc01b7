"""Typological vectors: what holds for any table."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse import Typology
from tests.support.laws import examples

CODES = ["eng", "ind", "quy", "ace", "jav", "bxr"]
numbers = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-100, 100, width=32))


@st.composite
def tables(draw: st.DrawFn) -> dict[str, list[float]]:
    codes = draw(st.lists(st.sampled_from(CODES), min_size=2, max_size=6, unique=True))
    width = draw(st.integers(1, 12))
    return {code: draw(st.lists(numbers, min_size=width, max_size=width)) for code in codes}


@examples(100)
@given(tables(), st.randoms())
def test_saving_gives_back_the_same(table, random):
    typology = Typology.from_vectors(table)
    again = Typology.from_dict(json.loads(json.dumps(typology.to_dict(languages=table))))
    assert again.digest == typology.digest
    assert torch.equal(again.vectors(table), typology.vectors(table))
    again.require_same(typology.to_dict())
    order = list(table)
    random.shuffle(order)
    assert Typology.from_vectors({code: table[code] for code in order}).digest == typology.digest


@examples(100)
@given(tables(), st.data())
def test_the_digest_changes_with_any_value(table, data):
    code = data.draw(st.sampled_from(sorted(table)))
    place = data.draw(st.integers(0, len(table[code]) - 1))
    new = data.draw(numbers.filter(lambda value: value != table[code][place]))
    changed = {**table, code: [*table[code][:place], new, *table[code][place + 1 :]]}
    assert Typology.from_vectors(changed).digest != Typology.from_vectors(table).digest


@examples(100)
@given(tables(), st.floats(0.01, 10), st.integers(1, 6))
def test_nearest_and_weights(table, temperature, n):
    typology = Typology.from_vectors(table)
    code, *sources = table
    nearest = typology.nearest_languages(code, n)
    assert {other for other, _ in nearest} <= set(sources)
    assert len(nearest) == min(n, len(sources))
    for other, distance in nearest:
        a, b = typology.vector(code).double(), typology.vector(other).double()
        length = float(a.norm() * b.norm())
        if length > 1e-3:
            assert distance == pytest.approx(1 - float(a @ b) / length, abs=1e-9)
        assert distance == pytest.approx(dict(typology.nearest_languages(other, 9))[code], abs=1e-9)
    assert [d for _, d in nearest] == sorted(d for _, d in nearest)
    weights = typology.mixing_weights(code, sources, n=n, temperature=temperature)
    assert list(weights) == [other for other, _ in nearest]
    assert sum(weights.values()) == pytest.approx(1)
    assert list(weights.values()) == sorted(weights.values(), reverse=True)
    first, last = nearest[0], nearest[-1]
    assert weights[last[0]] / weights[first[0]] == pytest.approx(math.exp((first[1] - last[1]) / temperature))

"""Supports that keep to a share of the rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse import ConfigError, SelectionError
from peft_sparse.core.indices import check_indices
from peft_sparse.selection.budget import Group
from peft_sparse.selection.random import random_indices
from peft_sparse.selection.rows import (
    RowConfinement,
    best_rows,
    check_room,
    check_support_rows,
    in_whole,
    num_rows,
    random_in_rows,
    room,
    rows_of,
)
from peft_sparse.selection.top_k import joint_top_k
from tests.support.laws import examples


@pytest.mark.parametrize("share", [0, -0.1, 1.5, True, "0.1", float("nan"), [0.1]])
def test_a_share_is_a_number_up_to_one(share):
    with pytest.raises(ConfigError, match=r"support_rows must be a share of the rows of each tensor in \(0, 1\]"):
        check_support_rows(share)


@pytest.mark.parametrize(
    ("share", "shape", "rows", "held"),
    [
        (0.1, (100, 7), 10, 70),
        (0.35, (10, 3), 3, 9),
        (0.1, (4, 5), 1, 5),
        (1.0, (4, 5), 4, 20),
        (1, (4, 5), 4, 20),
        (None, (4, 5), None, 20),
        (0.1, (40,), None, 40),
        (0.5, (6, 2, 3, 3), 3, 54),
        (0.29, (100, 2), 29, 58),
        (0.1, (0, 5), None, 0),
    ],
)
def test_rows_and_room(share, shape, rows, held):
    assert num_rows(share, shape) == rows
    assert room(share, shape) == held


def test_more_weights_than_room_are_refused():
    groups = [Group("a.weight", ("a.weight",), 31)]
    with pytest.raises(ConfigError, match=r"support_rows=0\.1 leaves room for 30 weights in a\.weight, but 31"):
        check_room(groups, {"a.weight": (30, 10)}, 0.1)
    check_room(groups, {"a.weight": (30, 10)}, None)


def test_best_rows_have_the_largest_sums():
    scores = torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 0.5], [2.0, 1.0]])
    assert best_rows(scores, 2, name="w").tolist() == [1, 3]
    assert best_rows(scores, 1, name="w").tolist() == [1]
    assert best_rows(scores, 2, name="w", kept=torch.tensor([2])).tolist() == [1, 2]
    assert best_rows(scores, 1, name="w", kept=torch.tensor([0, 2])).tolist() == [0, 2]
    assert best_rows(scores, 3, name="w", kept=torch.tensor([], dtype=torch.int64)).tolist() == [0, 1, 3]


def test_nan_is_refused_by_name():
    with pytest.raises(SelectionError, match=r"scores of layer\.weight contain NaN"):
        RowConfinement(0.5).confine("layer.weight", torch.tensor([[1.0, float("nan")], [0.0, 0.0]]))


def test_infinities_of_both_signs_in_a_row_are_no_nan():
    scores = torch.tensor([[float("inf"), -float("inf")], [2.0, 1.0], [float("inf"), 0.0], [-float("inf"), 9.0]])
    assert best_rows(scores, 2, name="w").tolist() == [1, 2]


def test_random_positions_of_all_rows_are_those_without_a_limit():
    free = random_indices(240, 30, seed=3, name="w")
    assert torch.equal(random_in_rows((12, 20), 30, share=1.0, seed=3, name="w"), free)
    assert torch.equal(random_in_rows((12, 20), 30, share=None, seed=3, name="w"), free)


def test_random_rows_differ_by_seed_and_name():
    drawn = {
        tuple(rows_of(random_in_rows((50, 4), 20, share=0.1, seed=seed, name=name), (50, 4)).tolist())
        for seed in range(4)
        for name in ("a", "b")
    }
    assert len(drawn) == 8


shapes = st.tuples(st.integers(1, 12), st.integers(1, 6))
shares = st.floats(0.05, 1.0)


@examples(150)
@given(shapes, shares, st.integers(0, 5), st.data())
def test_random_positions_are_exactly_k_in_at_most_the_share_of_rows(shape, share, seed, data):
    k = data.draw(st.integers(0, room(share, shape)))
    found = random_in_rows(shape, k, share=share, seed=seed, name="w")
    check_indices(found, shape[0] * shape[1], name="w")
    assert found.numel() == k
    assert rows_of(found, shape).numel() <= max(1, share * shape[0])


@examples(150)
@given(st.lists(shapes, min_size=1, max_size=4), shares, st.data())
def test_joint_selection_is_exactly_k_of_the_best_rows(all_shapes, share, data):
    scores = {
        f"p{i}": torch.tensor(
            data.draw(st.lists(st.integers(0, 9), min_size=o * c, max_size=o * c)), dtype=torch.float32
        ).view(o, c)
        for i, (o, c) in enumerate(all_shapes)
    }
    k = data.draw(st.integers(0, sum(room(share, s.shape) for s in scores.values())))
    confinement = RowConfinement(share)
    confined = {name: confinement.confine(name, s) for name, s in scores.items()}
    found = confinement.in_whole(joint_top_k(confined, k))
    assert sum(indices.numel() for indices in found.values()) == k
    # By hand: all other rows out of the running.
    masked = {}
    for name, s in scores.items():
        order = sorted(range(s.shape[0]), key=lambda row, s=s: (-float(s[row].double().sum()), row))
        masked[name] = torch.full_like(s, -1.0)
        best = order[: num_rows(share, s.shape)]
        masked[name][best] = s[best]
    expected = joint_top_k(masked, k)
    for name, indices in found.items():
        check_indices(indices, scores[name].numel(), name=name)
        assert indices.tolist() == expected[name].tolist()


def test_positions_in_rows_of_a_convolution():
    rows = torch.tensor([1, 3])
    inside = torch.tensor([0, 7, 8, 15])
    assert in_whole(inside, rows, (4, 2, 2, 2)).tolist() == [8, 15, 24, 31]

"""Criteria that score once: their formulas, their names, and the shortlist of the best."""

from __future__ import annotations

import functools

import pytest
import torch

from peft_sparse.errors import ConfigError, SelectionError
from peft_sparse.selection.criteria import CRITERIA, Criterion, GradientMeans, criterion_name, resolve_criterion
from peft_sparse.selection.lazy_tensors import LazyTensors
from peft_sparse.selection.shortlist import Shortlist

WEIGHT = torch.tensor([[2.0, -3.0], [0.0, 0.5]])
GRADIENTS = GradientMeans(torch.tensor([[-1.0, 0.5], [4.0, 0.0]]), torch.tensor([[1.0, 2.0], [17.0, 0.0]]), 3)


def my_score(weight, gradients):
    return weight


class Scorer:
    def __call__(self, weight, gradients):
        return weight


@pytest.mark.parametrize(
    ("name", "expected", "needs_gradients"),
    [
        ("fisher", [[1.0, 2.0], [17.0, 0.0]], True),
        ("gradient", [[1.0, 0.5], [4.0, 0.0]], True),
        ("weight_times_gradient", [[2.0, 1.5], [0.0, 0.0]], True),
        ("largest_weight", [[2.0, 3.0], [0.0, 0.5]], False),
        ("smallest_weight", [[-2.0, -3.0], [-0.0, -0.5]], False),
    ],
)
def test_formulas(name, expected, needs_gradients):
    criterion = CRITERIA[name]
    weight = WEIGHT if "weight" in criterion.uses else None
    given = GradientMeans(
        GRADIENTS.mean if "mean" in criterion.uses else None,
        GRADIENTS.mean_squared if "mean_squared" in criterion.uses else None,
        3,
    )
    assert criterion.score(weight, given).tolist() == expected
    assert criterion.needs_gradients is needs_gradients
    assert WEIGHT.tolist() == [[2.0, -3.0], [0.0, 0.5]]


def test_every_known_criterion_has_its_formula_tested():
    above = {"fisher", "gradient", "weight_times_gradient", "largest_weight", "smallest_weight"}
    elsewhere = {"gradient_on_small_weights", "low_rank_weight"}  # tests/unit/training/test_nomination.py
    assert set(CRITERIA) == above | elsewhere


def test_names():
    assert criterion_name("fisher") == criterion_name(CRITERIA["fisher"]) == "fisher"
    assert criterion_name(my_score) == f"callable:{__name__}.my_score"
    assert criterion_name(Criterion(my_score, uses=("weight",))) == f"callable:{__name__}.my_score"
    assert criterion_name(Scorer()) == f"callable:{__name__}.Scorer"
    assert criterion_name(functools.partial(my_score)) == "callable:functools.partial"


def test_a_function_is_given_everything_and_a_criterion_what_it_declares():
    assert resolve_criterion(my_score) == Criterion(my_score, ("weight", "mean", "mean_squared"))
    own = Criterion(my_score, uses=("weight",))
    assert resolve_criterion(own) is own
    assert not own.needs_gradients
    assert resolve_criterion("gradient") is CRITERIA["gradient"]


@pytest.mark.parametrize("criterion", ["fischer", 3, None])
def test_an_unknown_criterion_lists_the_known(criterion):
    known = r"criterion must be one of \['fisher', 'gradient', .*\], a Criterion, or a function"
    with pytest.raises(ConfigError, match=known):
        resolve_criterion(criterion)


def test_a_name_out_of_a_file_is_never_imported():
    with pytest.raises(ConfigError, match=r"criterion='callable:os.getcwd' is how a file names the function"):
        resolve_criterion("callable:os.getcwd")


@pytest.mark.parametrize("uses", [(), ("gradients",)])
def test_a_criterion_of_nothing(uses):
    with pytest.raises(ConfigError, match=r"must use some of \('weight', 'mean', 'mean_squared'\), got uses="):
        Criterion(my_score, uses=uses)


def test_computed_tensors_are_not_kept():
    asked = []
    scores = LazyTensors(["b", "a"], lambda name: asked.append(name) or torch.zeros(1))
    assert list(scores) == ["b", "a"]
    assert len(scores) == 2
    assert scores["a"] is not scores["a"]
    assert asked == ["a", "a"]
    with pytest.raises(KeyError):
        scores["c"]


def test_a_shortlist_says_how_many_are_eligible():
    shortlist = Shortlist(3, name="group g", min_score=0.0)
    shortlist.add({"a": torch.tensor([0.0, 1.0, -1.0])})
    shortlist.add({"b": torch.tensor([[0.0, 2.0]])})
    with pytest.raises(SelectionError, match=r"3 weights .* from group g, but only 2 of 5 scored above 0\.0"):
        shortlist.select()
    shortlist.add({"c": torch.tensor([0.5])})
    assert {name: indices.tolist() for name, indices in shortlist.select().items()} == {"a": [1], "b": [1], "c": [0]}


def test_a_shortlist_that_asks_for_more_than_there_is():
    shortlist = Shortlist(3, name="g")
    shortlist.add({"a": torch.tensor([0.0, 1.0])})
    with pytest.raises(SelectionError, match="3 weights are asked from g, which holds 2"):
        shortlist.select()


def test_a_shortlist_names_the_tensor_with_nan():
    with pytest.raises(SelectionError, match="scores of b contain NaN"):
        Shortlist(1, name="g").add({"a": torch.zeros(2), "b": torch.tensor([torch.nan])})

"""The maximum spanning tree is the best of all trees, by brute force and by another library."""

from __future__ import annotations

import itertools

import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse.errors import ConfigError
from peft_sparse.parsing import maximum_spanning_tree


def is_tree(heads: tuple[int, ...] | list[int]) -> bool:
    """Whether every word gets to the root."""
    for start in range(1, len(heads) + 1):
        node = start
        for _ in heads:
            node = heads[node - 1]
            if node == 0:
                break
        if node != 0:
            return False
    return True


def total(scores: np.ndarray, heads) -> float:
    return float(sum(scores[i, head] for i, head in enumerate(heads)))


def best_by_brute_force(scores: np.ndarray, *, single_root: bool) -> float:
    n = len(scores)
    trees = (h for h in itertools.product(range(n + 1), repeat=n) if is_tree(h))
    return max(total(scores, h) for h in trees if not single_root or list(h).count(0) == 1)


@pytest.mark.parametrize("single_root", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_it_is_the_best_of_all_trees(n, single_root):
    chance = np.random.default_rng(n)
    for trial in range(40 if n < 5 else 6):
        scores = chance.normal(size=(n, n + 1)) * 10.0 ** chance.integers(-2, 3)
        if trial % 2:
            # Ties, and greedy heads in cycles.
            scores = np.round(scores)
        heads = maximum_spanning_tree(scores, single_root=single_root)
        assert is_tree(heads)
        assert heads.count(0) == 1 or not single_root
        assert total(scores, heads) == pytest.approx(best_by_brute_force(scores, single_root=single_root))


@given(st.integers(2, 14), st.integers(0, 10**6))
def test_it_is_networkxs(n, seed):
    scores = np.random.default_rng(seed).normal(size=(n, n + 1))
    graph = networkx.DiGraph()
    graph.add_weighted_edges_from((h, d + 1, scores[d, h]) for d in range(n) for h in range(n + 1) if h != d + 1)
    theirs = networkx.maximum_spanning_arborescence(graph, preserve_attrs=False)
    expected = [next(iter(theirs.predecessors(word))) for word in range(1, n + 1)]
    assert maximum_spanning_tree(scores, single_root=False) == expected


def test_cycles_within_cycles_are_broken():
    # 1 <-> 2, that pair and 3 and 4 in a ring, and the root far away.
    scores = np.full((4, 5), -50.0)
    for word, head, score in [(1, 2, 10), (2, 1, 10), (3, 2, 8), (4, 3, 8), (1, 4, 9), (3, 0, -20)]:
        scores[word - 1, head] = score
    heads = maximum_spanning_tree(scores)
    assert is_tree(heads)
    assert total(scores, heads) == best_by_brute_force(scores, single_root=True)


def test_a_long_sentence_and_a_large_range_are_no_trouble():
    scores = np.random.default_rng(0).normal(size=(300, 301)) * 1e4
    heads = maximum_spanning_tree(scores)
    assert is_tree(heads)
    assert heads.count(0) == 1
    assert maximum_spanning_tree(np.zeros((0, 1))) == []
    own = np.full((2, 3), np.nan)
    own[:, 0], own[0, 2], own[1, 1] = [1.0, 3.0], 0.5, 0.5
    assert maximum_spanning_tree(own) == [2, 0]


@pytest.mark.parametrize("scores", [np.zeros((2, 2)), np.zeros(3), np.full((2, 3), np.nan), np.full((2, 3), -np.inf)])
def test_what_is_no_matrix_of_scores_is_refused(scores):
    with pytest.raises(ConfigError, match="scores must be"):
        maximum_spanning_tree(scores)

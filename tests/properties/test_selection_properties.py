"""Selection and budgets for any sizes, scores and requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_sparse import SelectionError
from peft_sparse.core.indices import check_indices
from peft_sparse.selection.budget import draw_counts, groups_of, round_density, total_from_request
from peft_sparse.selection.random import random_counts, random_indices
from peft_sparse.selection.top_k import joint_top_k, streamed_top_k, top_k
from tests.support.laws import examples

# Few different values, so that most examples have ties; all float32 otherwise.
floats = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), 1e-45]), st.floats(width=32, allow_nan=False)
)
size_maps = st.lists(st.integers(0, 400), min_size=1, max_size=12).map(lambda s: {f"p{i}": n for i, n in enumerate(s)})


def outcome(select: Callable[..., dict[str, Tensor]], scores: Any, k: int, min_score: float | None) -> object:
    """What a selection gives: names, dtypes and positions in order, or the words of its error."""
    try:
        return [(name, i.dtype, i.tolist()) for name, i in select(scores, k, min_score=min_score).items()]
    except SelectionError as error:
        return str(error)


def by_sorting(scores: list[float], k: int) -> list[int]:
    """The k best positions by a stable sort."""
    return sorted(np.argsort(-np.array(scores, dtype=np.float32), kind="stable")[:k].tolist())


@examples(200)
@given(st.lists(floats, max_size=60), st.data())
def test_top_k_equals_sorting(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(scores)))
    tensor = torch.tensor(scores, dtype=torch.float32)
    result = top_k(tensor, k, name="w")
    check_indices(result, len(scores), name="w")
    assert result.tolist() == by_sorting(scores, k)


@examples(100)
@given(st.lists(st.lists(floats, max_size=15), min_size=1, max_size=5), st.data())
def test_joint_top_k_equals_top_k_of_the_concatenation(parts: list[list[float]], data: st.DataObject) -> None:
    flat = [score for part in parts for score in part]
    k = data.draw(st.integers(0, len(flat)))
    result = joint_top_k({f"p{i}": torch.tensor(part, dtype=torch.float32) for i, part in enumerate(parts)}, k)
    starts = np.cumsum([0, *map(len, parts)])
    found = [int(starts[i]) + j for i in range(len(parts)) for j in result[f"p{i}"].tolist()]
    assert found == by_sorting(flat, k)


# Steps of one, so that the k-th largest so far often stands close to what comes next.
steps = st.integers(-3, 12).map(float)


@examples(200)
@given(
    st.lists(st.lists(st.one_of(floats, steps), max_size=15), max_size=8), st.sampled_from([None, 0.0, -1.0]), st.data()
)
def test_streamed_top_k_equals_joint_top_k(
    parts: list[list[float]], min_score: float | None, data: st.DataObject
) -> None:
    k = data.draw(st.integers(0, min(9, sum(map(len, parts)))))
    scores = {f"p{i}": torch.tensor(part, dtype=torch.float32) for i, part in enumerate(parts)}
    expected = outcome(joint_top_k, scores, k, min_score)
    found = outcome(streamed_top_k, iter(scores.items()), k, min_score)
    assert found == expected


@examples(200)
@given(size_maps, st.data())
def test_uniform_is_exact_and_within_one_of_proportional(sizes: dict[str, int], data: st.DataObject) -> None:
    targeted = sum(sizes.values())
    total = data.draw(st.integers(0, targeted))
    counts = {group.name: group.count for group in groups_of("uniform", total, sizes)}
    assert list(counts) == list(sizes)
    assert sum(counts.values()) == total
    for name, count in counts.items():
        assert 0 <= count <= sizes[name]
        assert abs(count * targeted - total * sizes[name]) < max(targeted, 1)


@examples(200)
@given(
    size_maps, st.floats(0, 1, exclude_min=True), st.sampled_from(["uniform", "global", "shares"]), st.integers(0, 99)
)
def test_any_density_gives_counts_that_sum_to_it(sizes: dict[str, int], density: float, budget: str, seed: int) -> None:
    if not any(sizes.values()):
        return
    total = total_from_request(density=density, shapes={name: (size,) for name, size in sizes.items()})
    assert total == round_density(density, sum(sizes.values()))
    assert 1 <= total <= sum(sizes.values())
    groups = groups_of({"p": 1.0} if budget == "shares" else budget, total, sizes)
    counts = draw_counts(groups, sizes, seed=seed)
    assert sum(group.count for group in groups) == total
    for group in groups:
        assert sum(counts[name] for name in group.members) == group.count
    assert all(0 <= counts[name] <= sizes[name] for name in sizes)


@examples(200)
@given(st.lists(st.integers(0, 500), max_size=8), st.data())
def test_random_counts_fit(sizes: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, sum(sizes)))
    counts = random_counts(sizes, k, seed=data.draw(st.integers(0, 2**64)), name="g")
    assert sum(counts) == k
    assert len(counts) == len(sizes)
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))


@examples(200)
@given(st.one_of(st.integers(0, 300), st.integers(2**31 - 5, 2**31 + 5)), st.integers(0, 2**64), st.text(), st.data())
def test_random_indices_are_a_support(numel: int, seed: int, name: str, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, min(numel, 200)))
    indices = random_indices(numel, k, seed=seed, name=name)
    assert indices.numel() == k
    check_indices(indices, numel, name="w")
    assert torch.equal(random_indices(numel, k, seed=seed, name=name), indices)

"""Growth candidates from row and column accumulators, against the outer product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_sparse.errors import SelectionError
from peft_sparse.selection import momentum
from peft_sparse.selection.momentum import grow_candidates, momentum_estimate


def dense_best(rows: Tensor, columns: Tensor, active: Tensor, num: int) -> Tensor:
    """The same by forming and sorting everything."""
    scores = rows.sqrt().sqrt().double().outer(columns.sqrt().sqrt().double()).flatten()
    scores[active.long()] = 0
    order = scores.sort(descending=True, stable=True).indices[:num]
    return order[scores[order] > 0].sort().values


def example(seed: int, shape: tuple[int, int], kind: str) -> tuple[Tensor, Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.rand(n, generator=generator) ** 8 for n in shape)
    if kind != "smooth":
        rows, columns = ((accumulator * 3).round() / 3 for accumulator in (rows, columns))
    if kind == "equal":
        rows, columns = torch.ones(shape[0]), torch.ones(shape[1])
    numel = shape[0] * shape[1]
    count, num = (int(torch.randint(0, numel + 1, (), generator=generator)) for _ in range(2))
    return rows, columns, torch.randperm(numel, generator=generator)[:count].sort().values.int(), num


@pytest.mark.parametrize("kind", ["smooth", "ties", "equal"])
@pytest.mark.parametrize("slack", [0, 5, 4096])
def test_equals_the_outer_product(kind: str, slack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(momentum, "_SLACK", slack)
    for seed, shape in enumerate([(1, 1), (1, 30), (30, 1), (17, 13), (40, 9), (25, 32)] * 5):
        rows, columns, active, num = example(seed, shape, kind)
        found = grow_candidates(rows, columns, active, num)
        assert torch.equal(found.indices.long(), dense_best(rows, columns, active, num)), (seed, shape)
        assert found.indices.dtype == torch.int32


def test_more_entries_than_the_slack() -> None:
    for seed, kind in enumerate(["smooth", "ties", "equal"]):
        rows, columns, active, num = example(seed, (150, 120), kind)
        assert torch.equal(
            grow_candidates(rows, columns, active, num).indices.long(), dense_best(rows, columns, active, num)
        )


def test_scores_are_fourth_roots_in_gradient_units() -> None:
    rows, columns = torch.tensor([16.0, 1.0]), torch.tensor([1.0, 81.0, 0.0])
    found = grow_candidates(rows, columns, torch.tensor([1], dtype=torch.int32), 2)
    assert found.indices.tolist() == [0, 4]
    assert found.scores.tolist() == [2.0, 3.0]
    assert found.scores.dtype == torch.float32
    assert momentum_estimate(rows, columns, torch.tensor([1])).tolist() == [6.0]


def test_entries_without_an_estimate_are_no_candidates() -> None:
    found = grow_candidates(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0]), 5)
    assert found.indices.tolist() == [2]
    assert grow_candidates(torch.zeros(2), torch.ones(3), torch.tensor([0]), 5).indices.numel() == 0
    assert grow_candidates(torch.ones(2), torch.ones(3), torch.tensor([0]), 0).indices.numel() == 0


def test_tiny_accumulators_keep_their_order() -> None:
    # As a product of squares these would be smaller than the smallest float32.
    rows, columns = torch.tensor([1e-30, 2e-30]), torch.tensor([3e-30, 1e-30])
    assert grow_candidates(rows, columns, torch.empty(0, dtype=torch.int32), 1).indices.tolist() == [2]


def test_memory_is_far_below_that_of_the_weight() -> None:
    shape = (20_000, 30_000)  # 600 million entries: 2.4 GB as float32
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.rand(n, generator=generator) for n in shape)
    active = torch.randint(0, shape[0] * shape[1], (1000,), generator=generator).unique().int()
    found = grow_candidates(rows, columns, active, 1000)
    best = torch.stack([rows.topk(200).values.min(), columns.topk(200).values.min()])
    assert found.indices.numel() == 1000
    assert float(found.scores.min()) > float(best.prod() ** 0.25) * 0.99


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
def test_accumulators_that_cannot_be_are_refused(wrong: float) -> None:
    with pytest.raises(SelectionError, match="accumulators of the columns must be finite and >= 0"):
        grow_candidates(torch.ones(2), torch.tensor([1.0, wrong]), torch.tensor([0]), 1)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(SelectionError, match="num must be >= 0, got -1"):
        grow_candidates(torch.ones(2), torch.ones(2), torch.tensor([0]), -1)

"""SM3-II on sparse deltas and dense parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_sparse.errors import ConfigError
from peft_sparse.optim.other_states import refusing_ours
from peft_sparse.optim.sm3 import SM3
from peft_sparse.optim.sparse_adamw import SparseAdamW
from peft_sparse.tuners.sparse_ft.layers.delta import AdapterDelta


def delta(shape: tuple[int, ...], indices: list[int], dtype: torch.dtype = torch.float32) -> AdapterDelta:
    made = AdapterDelta(shape, len(indices), dtype=dtype, device=None)
    made.set_support(torch.tensor(indices, dtype=torch.int32))
    return made


class ByHand:
    """Every accumulator as a set of entries, one after the other (Anil et al., SM3-II)."""

    def __init__(self, entries: list[tuple[int, ...]], rank: int) -> None:
        self.entries, self.rank = entries, rank
        self.accumulators: dict[tuple[int, int], float] = {}
        self.values = [0.0] * len(entries)

    def step(self, gradient: list[float], lr: float, eps: float) -> None:
        covers = [[(d, entry[d]) for d in range(self.rank)] for entry in self.entries]
        estimates = [
            min(self.accumulators.get(c, 0.0) for c in cover) + g * g for cover, g in zip(covers, gradient, strict=True)
        ]
        for j, (cover, estimate) in enumerate(zip(covers, estimates, strict=True)):
            for c in cover:
                self.accumulators[c] = max(self.accumulators.get(c, 0.0), estimate)
            self.values[j] -= lr * gradient[j] / (estimate + eps) ** 0.5


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4)])
def test_a_sparse_matrix_uses_rows_and_columns_of_its_entries(shape: tuple[int, ...]) -> None:
    indices = [0, 3, 4, 7, 11, 19]
    d = delta(shape, indices, torch.float64)
    columns = d.numel // shape[0]
    hand = ByHand([divmod(i, columns) for i in indices], 2)
    optimizer = SM3([d.values], lr=0.3, deltas=[d], eps=1e-4)
    for step in range(6):
        d.values.grad = torch.randn(len(indices), generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        hand.step(d.values.grad.tolist(), 0.3, 1e-4)
        optimizer.step()
    torch.testing.assert_close(d.values.detach(), torch.tensor(hand.values, dtype=torch.float64), rtol=1e-12, atol=0)
    row, column = optimizer.row_accumulator(d.values), optimizer.column_accumulator(d.values)
    assert (row.numel(), column.numel()) == (shape[0], columns)
    for axis, accumulator in enumerate((row, column)):
        expected = [hand.accumulators.get((axis, i), 0.0) for i in range(accumulator.numel())]
        torch.testing.assert_close(accumulator, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2), (6,), ()])
def test_dense_parameters_of_any_rank(shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    entries = [tuple(e) for e in torch.ones(shape).nonzero().tolist()]
    # A vector's entries, and a lone number, have an accumulator each.
    hand = ByHand(entries if shape else [(0,)], max(len(shape), 1))
    optimizer = SM3([p], lr=0.3)
    for step in range(6):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        hand.step(p.grad.flatten().tolist(), 0.3, 1e-8)
        optimizer.step()
    expected = torch.tensor(hand.values, dtype=torch.float64).view(shape)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=0)


def test_a_fully_tuned_matrix_is_a_dense_one() -> None:
    d = delta((3, 4), list(range(12)), torch.float64)
    p = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    sparse, dense = SM3([d.values], deltas=[d], momentum=0.9), SM3([p], momentum=0.9)
    for step in range(5):
        p.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        d.values.grad = p.grad.flatten()
        sparse.step()
        dense.step()
    assert torch.equal(d.values.view(3, 4), p)


def test_a_delta_on_a_vector_is_adagrad() -> None:
    d, p = delta((9,), [1, 4, 6]), nn.Parameter(torch.zeros(3))
    optimizer, adagrad = SM3([d.values], lr=0.1, deltas=[d], eps=1e-20), torch.optim.Adagrad([p], lr=0.1, eps=1e-10)
    for step in range(5):
        p.grad = torch.randn(3, generator=torch.Generator().manual_seed(step))
        d.values.grad = p.grad.clone()
        optimizer.step()
        adagrad.step()
    torch.testing.assert_close(d.values.detach(), p.detach(), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"got a delta on shape \(9,\)"):
        optimizer.row_accumulator(d.values)


def test_accumulators_remember_entries_that_left() -> None:
    d = delta((2, 3), [0, 5])
    optimizer = SM3([d.values], deltas=[d])
    d.values.grad = torch.tensor([3.0, 1.0])
    optimizer.step()
    d.set_support(torch.tensor([1, 5], dtype=torch.int32))
    d.values.grad = torch.tensor([1.0, 1.0])
    optimizer.step()
    assert optimizer.row_accumulator(d.values).tolist() == [9.0, 2.0]
    assert optimizer.column_accumulator(d.values).tolist() == [9.0, 1.0, 2.0]


def test_momentum_averages_preconditioned_gradients() -> None:
    d = delta((1, 2), [0, 1], torch.float64)
    optimizer = SM3([d.values], lr=1.0, deltas=[d], momentum=0.75, eps=1e-30)
    d.values.grad = torch.tensor([2.0, 0.0], dtype=torch.float64)
    optimizer.step()
    assert d.values.tolist() == pytest.approx([-0.25, 0.0])
    optimizer.step()
    assert d.values.tolist() == pytest.approx([-0.25 - (0.75 * 0.25 + 0.25 * 2 / 8**0.5), 0.0])


def test_weight_decay_pulls_values_to_zero() -> None:
    d = delta((2, 2), [0])
    d.values.data.fill_(2.0)
    d.values.grad = torch.zeros(1)
    SM3([d.values], lr=0.1, deltas=[d], weight_decay=0.5).step()
    assert d.values.item() == pytest.approx(2 * (1 - 0.1 * 0.5))


def run(optimizer: torch.optim.Optimizer, p: Tensor, gradients: list[float]) -> None:
    for g in gradients:
        p.grad = torch.full_like(p, g)
        optimizer.step()


def test_state_stays_float32_when_it_is_loaded() -> None:
    d = delta((2, 2), [0, 3], torch.bfloat16)
    optimizer = SM3([d.values], deltas=[d], momentum=0.5)
    run(optimizer, d.values, [1.0, 0.03])
    other = copy.deepcopy(d)
    loaded = SM3([other.values], deltas=[other], momentum=0.5)
    for _ in range(2):  # torch adds to the settings of an optimizer that has loaded one
        loaded.load_state_dict(optimizer.state_dict())
    assert loaded.row_accumulator(other.values).dtype == torch.float32
    assert torch.equal(loaded.row_accumulator(other.values), optimizer.row_accumulator(d.values))
    assert loaded.row_accumulator(other.values)[0].bfloat16() != loaded.row_accumulator(other.values)[0]
    run(optimizer, d.values, [0.3])
    run(loaded, other.values, [0.3])
    assert torch.equal(d.values, other.values)


@pytest.mark.parametrize("other", [SparseAdamW, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("has_stepped", [True, False])
def test_states_of_other_optimizers_are_refused(other: type[torch.optim.Optimizer], has_stepped: bool) -> None:
    d = delta((2, 2), [0, 3])
    wrote = other([d.values], lr=0.1)
    if has_stepped:
        run(wrote, d.values, [1.0])
    optimizer = SM3([d.values], deltas=[d], momentum=0.5)
    with pytest.raises(ConfigError, match=r"was written by .*, and this run's is SM3"):
        optimizer.load_state_dict(wrote.state_dict())
    run(optimizer, d.values, [1.0])
    assert optimizer.row_accumulator(d.values).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.SGD, SparseAdamW])
def test_other_optimizers_refuse_its_state_where_they_are_told_to(other: type[torch.optim.Optimizer]) -> None:
    d = delta((2, 2), [0, 3])
    wrote = SM3([d.values], deltas=[d])
    run(wrote, d.values, [1.0])
    optimizer = other([d.values], lr=0.1)
    with (
        refusing_ours(optimizer),
        pytest.raises(ConfigError, match=f"was written by SM3, and this run's is {other.__name__}"),
    ):
        optimizer.load_state_dict(wrote.state_dict())
    with refusing_ours(wrote):
        wrote.load_state_dict(copy.deepcopy(wrote.state_dict()))
    assert wrote.row_accumulator(d.values).tolist() == [1.0, 1.0]


def test_a_copied_optimizer_knows_the_copied_deltas() -> None:
    d = delta((2, 2), [0, 3])
    optimizer = SM3([d.values], deltas=[d])
    run(optimizer, d.values, [1.0])
    both = copy.deepcopy({"delta": d, "optimizer": optimizer})
    assert both["optimizer"].row_accumulator(both["delta"].values).tolist() == [1.0, 1.0]
    run(both["optimizer"], both["delta"].values, [1.0])
    assert optimizer.row_accumulator(d.values).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
        ({"eps": 0.0}, "eps must be > 0"),
    ],
)
def test_errors(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SM3([nn.Parameter(torch.zeros(1))], **wrong)


def test_arguments_of_other_optimizers_are_errors() -> None:
    with pytest.raises(TypeError, match="betas"):
        SM3([nn.Parameter(torch.zeros(1))], betas=(0.9, 0.999))  # type: ignore[call-arg]


def test_accumulators_before_the_first_step_and_of_unnamed_deltas() -> None:
    d = delta((2, 2), [0])
    with pytest.raises(ValueError, match="have no accumulators yet"):
        SM3([d.values], deltas=[d]).row_accumulator(d.values)
    with pytest.raises(ValueError, match=r"got an unknown parameter. Name the deltas .* SM3\(params, deltas=...\)"):
        SM3([d.values]).column_accumulator(d.values)

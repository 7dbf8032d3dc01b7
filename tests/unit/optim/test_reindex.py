"""Optimizer state follows its weights, and grown weights start right."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn, optim
from transformers.optimization import Adafactor

from peft_sparse.optim import reindex as reindex_module
from peft_sparse.optim.quantized_state import dequantize, quantize
from peft_sparse.optim.reindex import GrownGradients, reindex
from peft_sparse.optim.sm3 import SM3
from peft_sparse.optim.sparse_adamw import SparseAdamW
from peft_sparse.selection.replacement import Candidates, Replacement, drop_and_grow, redistribute
from peft_sparse.tuners.sparse_ft.layers.delta import AdapterDelta

LR = 0.01
GAMMA = 5
OLD = torch.tensor([2, 4, 6, 8, 10], dtype=torch.int32)
# 4 and 8 leave, 1 and 9 enter, so all others but the first change places: [1, 2, 6, 9, 10].
REPLACEMENT = drop_and_grow(
    OLD,
    torch.tensor([5.0, 0.0, 5.0, 1.0, 5.0]),
    Candidates(torch.tensor([1, 9], dtype=torch.int32), torch.tensor([1.0, 2.0])),
    num_replaced=2,
)
STAYED = {1: 0, 2: 2, 4: 4}  # new position: old position
GROWN = [0, 3]

MAKERS: dict[str, Callable[[list[nn.Parameter]], optim.Optimizer]] = {
    "SparseAdamW": lambda p: SparseAdamW(p, LR),
    "Adam": lambda p: optim.Adam(p, LR),
    "AdamW": lambda p: optim.AdamW(p, LR, weight_decay=0.0),
    "AdamW foreach": lambda p: optim.AdamW(p, LR, weight_decay=0.0, foreach=True),
    "AdamW fused": lambda p: optim.AdamW(p, LR, weight_decay=0.0, fused=True),
    "AdamW tensor betas": lambda p: optim.AdamW(
        p, LR, betas=(torch.tensor(0.9), torch.tensor(0.999)), weight_decay=0.0, foreach=False
    ),
    "AMSGrad": lambda p: optim.AdamW(p, LR, weight_decay=0.0, amsgrad=True),
    "RAdam": lambda p: optim.RAdam(p, LR),
    "NAdam": lambda p: optim.NAdam(p, LR),
    "Adamax": lambda p: optim.Adamax(p, LR),
    "RMSprop": lambda p: optim.RMSprop(p, LR, centered=True, momentum=0.5),
    "Adadelta": lambda p: optim.Adadelta(p),
    "Adagrad": lambda p: optim.Adagrad(p, LR, initial_accumulator_value=0.5),
    "torch Adafactor": lambda p: optim.Adafactor(p, LR),
    "Rprop": lambda p: optim.Rprop(p, LR),
    "SGD": lambda p: optim.SGD(p, LR, momentum=0.9),
    "ASGD": lambda p: optim.ASGD(p, LR),
    "transformers Adafactor": lambda p: Adafactor(p, lr=LR, beta1=0.9, relative_step=False),
}


@pytest.fixture(autouse=True)
def warn_anew() -> Iterator[None]:
    reindex_module._warned.clear()
    yield
    reindex_module._warned.clear()


def trained(
    make: Callable[[list[nn.Parameter]], optim.Optimizer], steps: int = 7
) -> tuple[optim.Optimizer, nn.Parameter]:
    p = nn.Parameter(torch.zeros(5))
    optimizer = make([p])
    for step in range(steps):
        p.grad = torch.randn(5, generator=torch.Generator().manual_seed(step)) + 0.1
        optimizer.step()
    return optimizer, p


def gradients(mean: float, mean_square: float, samples: int = GAMMA, n: int = 2) -> GrownGradients:
    return GrownGradients(torch.full((n,), mean), torch.full((n,), mean_square), samples)


def next_step(optimizer: optim.Optimizer, p: nn.Parameter, gradient: Tensor) -> Tensor:
    p.data.zero_()
    p.grad = gradient
    optimizer.step()
    return p.detach().clone()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("seeded", [False, True])
def test_weights_that_stay_do_not_notice(name: str, seeded: bool) -> None:
    """The next step of a weight that stays is what it would have been at its old place."""
    optimizer, p = trained(MAKERS[name])
    undisturbed, q = copy.deepcopy((optimizer, p))
    undisturbed.param_groups[0]["params"] = [q]
    reindex(optimizer, p, REPLACEMENT, gradients(0.3, 0.2) if seeded else None)
    state = optimizer.state[p]
    per_weight = [key for key, t in undisturbed.state[q].items() if isinstance(t, Tensor) and t.shape == (5,)]
    assert per_weight or name == "SparseAdamW"
    for key in per_weight:
        for new, old in STAYED.items():
            assert state[key][new] == undisturbed.state[q][key][old], key
    gradient = torch.tensor([0.5, -1.0, 0.25, 2.0, -0.125])
    if "Adafactor" in name:  # it divides by the norm of the whole tensor's step
        return
    moved = next_step(optimizer, p, REPLACEMENT.carry(gradient, 0.7))
    expected = next_step(undisturbed, q, gradient)
    for new, old in STAYED.items():
        torch.testing.assert_close(moved[new], expected[old], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name", ["SparseAdamW", "Adam", "AdamW", "AdamW foreach", "AdamW fused", "AdamW tensor betas", "AMSGrad", "Adamax"]
)
@pytest.mark.parametrize("gradient", [0.3, -2.0])
def test_a_seed_of_equal_gradients_gives_the_step_of_a_weight_that_saw_them_all(name: str, gradient: float) -> None:
    """After gamma gradients g before it was grown, and g again, a weight moves by lr, as one that was always there.

    With the age off by one, this step would be 1.14 times as large.
    """
    optimizer, p = trained(MAKERS[name])
    reindex(optimizer, p, REPLACEMENT, gradients(gradient, gradient**2))
    moved = next_step(optimizer, p, torch.full((5,), gradient))
    expected = -LR * (1 if gradient > 0 else -1)
    assert moved[GROWN].tolist() == pytest.approx([expected] * 2, rel=2e-6)


def test_seeded_moments_are_those_of_a_weight_that_saw_gamma_gradients() -> None:
    """Exactly: state and next step of SparseAdamW equal those of a weight that was updated gamma times with g."""
    veteran = nn.Parameter(torch.zeros(5))
    other = SparseAdamW([veteran], LR)
    for _ in range(GAMMA):
        veteran.grad = torch.full((5,), 0.3)
        other.step()
    optimizer, p = trained(MAKERS["SparseAdamW"], steps=40)
    reindex(optimizer, p, REPLACEMENT, gradients(0.3, 0.09))
    state = optimizer.state[p]
    assert state["age"].tolist() == [GAMMA, 40, 40, GAMMA, 40]
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[key][GROWN], other.state[veteran][key][:2], rtol=1e-6, atol=0)
    moved = next_step(optimizer, p, torch.full((5,), -1.0))
    torch.testing.assert_close(moved[GROWN], next_step(other, veteran, torch.full((5,), -1.0))[:2], rtol=1e-6, atol=0)
    assert state["age"].tolist() == [GAMMA + 1, 41, 41, GAMMA + 1, 41]


def test_gradients_are_in_the_order_of_the_grown_weights() -> None:
    optimizer, p = trained(MAKERS["SparseAdamW"])
    reindex(optimizer, p, REPLACEMENT, GrownGradients(torch.tensor([1.0, -2.0]), torch.tensor([1.0, 4.0]), 3))
    state = optimizer.state[p]
    assert state["exp_avg"][GROWN].tolist() == pytest.approx([1 - 0.9**3, -2 * (1 - 0.9**3)])
    assert state["exp_avg_sq"][GROWN].tolist() == pytest.approx([1 - 0.999**3, 4 * (1 - 0.999**3)])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AMSGrad", {"exp_avg": 0.3 * (1 - 0.9**7), "max_exp_avg_sq": 0.2 * (1 - 0.999**7)}),
        ("RAdam", {"exp_avg": 0.3 * (1 - 0.9**7), "exp_avg_sq": 0.2 * (1 - 0.999**7)}),
        ("NAdam", {"exp_avg": 0.3, "exp_avg_sq": 0.2 * (1 - 0.999**7)}),
        ("Adamax", {"exp_avg": 0.3 * (1 - 0.9**7), "exp_inf": 0.2**0.5}),
        ("RMSprop", {"square_avg": 0.2, "grad_avg": 0.3, "momentum_buffer": 0.0}),
        ("Adadelta", {"square_avg": 0.2, "acc_delta": 0.0}),
        ("Adagrad", {"sum": 0.5 + GAMMA * 0.2}),
        ("torch Adafactor", {"variance": 0.2}),
        ("Rprop", {"prev": 0.0, "step_size": LR}),
        ("SGD", {"momentum_buffer": 0.0}),
        ("ASGD", {"ax": 0.0}),
        ("transformers Adafactor", {"exp_avg_sq": 0.2, "exp_avg": 0.0}),
    ],
)
def test_every_known_optimizer_is_seeded_in_its_own_terms(
    name: str, expected: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    optimizer, p = trained(MAKERS[name])
    reindex(optimizer, p, REPLACEMENT, gradients(0.3, 0.2))
    for key, value in expected.items():
        assert optimizer.state[p][key][GROWN].tolist() == pytest.approx([value] * 2), key
    assert not caplog.records


@pytest.mark.parametrize("name", MAKERS)
def test_without_gradients_grown_weights_start_from_zero(name: str) -> None:
    optimizer, p = trained(MAKERS[name])
    reindex(optimizer, p, REPLACEMENT)
    # A step size of zero would never move its weight; Adagrad starts its sums from a value of its own.
    neutral = {"step_size": LR, "sum": 0.5}
    for key, tensor in optimizer.state[p].items():
        if isinstance(tensor, Tensor) and tensor.shape == (5,):
            assert tensor[GROWN].tolist() == pytest.approx([neutral.get(key, 0)] * 2), key
    moved = next_step(optimizer, p, torch.ones(5))
    assert bool((moved[GROWN] < 0).all())


def test_state_is_changed_in_place() -> None:
    optimizer, p = trained(MAKERS["AdamW"])
    before = optimizer.state[p]["exp_avg"].data_ptr()
    reindex(optimizer, p, REPLACEMENT, gradients(0.3, 0.2))
    assert optimizer.state[p]["exp_avg"].data_ptr() == before


def test_a_shared_age_stays_shared_until_a_weight_is_grown() -> None:
    optimizer, p = trained(MAKERS["SparseAdamW"])
    nothing = drop_and_grow(OLD, torch.ones(5), Candidates(OLD[:0], torch.empty(0)), num_replaced=3)
    reindex(optimizer, p, nothing, gradients(1, 1, n=0))
    assert optimizer.state[p]["age"].dim() == 0
    reindex(optimizer, p, REPLACEMENT, gradients(0.3, 0.2))
    reindex(optimizer, p, REPLACEMENT, gradients(0.3, 0.2, samples=2))
    assert optimizer.state[p]["age"].tolist() == [2, GAMMA, 7, 2, 7]


def sizes_change() -> tuple[Replacement, Replacement]:
    moved = redistribute(
        {"a": OLD, "b": OLD},
        {"a": torch.tensor([5.0, 0.0, 5.0, 1.0, 5.0]), "b": torch.full((5,), 9.0)},
        {"a": Candidates(OLD[:0], torch.empty(0)), "b": Candidates(torch.tensor([1, 9]).int(), torch.ones(2))},
        num_replaced=2,
    )
    return moved["a"], moved["b"]


@pytest.mark.parametrize("name", MAKERS)
def test_sizes_may_change(name: str) -> None:
    for replacement, kept in zip(sizes_change(), ([0, 2, 4], [1, 2, 3, 4, 6]), strict=True):
        optimizer, p = trained(MAKERS[name])
        before = copy.deepcopy(dict(optimizer.state[p]))
        estimates = gradients(0.3, 0.2, n=replacement.num_grown)
        reindex(optimizer, p, replacement, estimates)
        old = [0, 2, 4] if replacement.count == 3 else [0, 1, 2, 3, 4]
        for key, tensor in optimizer.state[p].items():
            if isinstance(tensor, Tensor) and before[key].shape == (5,):
                assert tensor.shape == (replacement.count,)
                new = list(range(3)) if replacement.count == 3 else kept
                assert torch.equal(tensor[new], before[key][old])
        p.data = replacement.carry(p)
        p.grad = torch.ones(replacement.count)
        optimizer.step()
        assert bool(p.isfinite().all())


def test_sm3_keeps_rows_and_columns_and_carries_momentum() -> None:
    delta = AdapterDelta((5, 4), 5, dtype=torch.float32, device=None)  # as many rows as tuned weights
    delta.set_support(OLD)
    optimizer = SM3([delta.values], deltas=[delta], momentum=0.9)
    delta.values.grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    optimizer.step()
    rows, columns = optimizer.row_accumulator(delta.values).clone(), optimizer.column_accumulator(delta.values).clone()
    momentum = optimizer.state[delta.values]["momentum_buffer"].clone()
    reindex(optimizer, delta.values, REPLACEMENT)
    assert torch.equal(optimizer.row_accumulator(delta.values), rows)
    assert torch.equal(optimizer.column_accumulator(delta.values), columns)
    carried = optimizer.state[delta.values]["momentum_buffer"]
    assert carried[GROWN].tolist() == [0.0, 0.0]
    assert torch.equal(carried[[1, 2, 4]], momentum[[0, 2, 4]])


def test_sm3_on_a_vector_carries_its_sums() -> None:
    delta = AdapterDelta((12,), 5, dtype=torch.float32, device=None)
    delta.set_support(OLD)
    optimizer = SM3([delta.values], deltas=[delta])
    delta.values.grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    optimizer.step()
    reindex(optimizer, delta.values, REPLACEMENT, gradients(0.3, 0.2))
    assert optimizer.state[delta.values]["accumulator_0"].tolist() == pytest.approx([1.0, 1.0, 9.0, 1.0, 25.0])


def test_before_the_first_step_there_is_nothing_to_carry() -> None:
    p = nn.Parameter(torch.zeros(5))
    for make in MAKERS.values():
        optimizer = make([p])
        before = dict(optimizer.state.get(p, {}))
        reindex(optimizer, p, REPLACEMENT, gradients(0.3, 0.2)) if not before else None
        assert dict(optimizer.state.get(p, {})) == before


def test_wrapped_optimizers_are_unwrapped() -> None:
    Accelerator(cpu=True)
    optimizer, p = trained(MAKERS["SparseAdamW"])
    reindex(AcceleratedOptimizer(optimizer, device_placement=False), p, REPLACEMENT, gradients(0.3, 0.2))
    assert optimizer.state[p]["age"].tolist() == [GAMMA, 7, 7, GAMMA, 7]


class Unheard(optim.Optimizer):
    """One state per weight, one of another shape, and a step."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {"lr": LR})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"trace": torch.arange(1.0, 6.0), "sketch": torch.ones(3), "step": torch.tensor(7.0)}


def test_an_unknown_optimizer_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    optimizer, p = trained(Unheard)
    with caplog.at_level(logging.WARNING, logger="peft_sparse"):
        reindex(optimizer, p, REPLACEMENT, gradients(0.3, 0.2))
        reindex(optimizer, p, REPLACEMENT, gradients(0.3, 0.2))
    assert len(caplog.records) == 1
    assert "Unheard is an optimizer whose state is unknown here" in caplog.text
    assert "its trace start at zero for the new ones" in caplog.text
    assert "its sketch are left as they are" in caplog.text
    state = optimizer.state[p]
    assert state["trace"].tolist() == [0.0, 0.0, 3.0, 0.0, 5.0]
    assert state["sketch"].tolist() == [1.0, 1.0, 1.0]


def test_an_optimizer_that_does_not_hold_the_values_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    optimizer, p = trained(MAKERS["AdamW"])
    before = copy.deepcopy(optimizer.state_dict())
    with caplog.at_level(logging.WARNING, logger="peft_sparse"):
        reindex(optimizer, nn.Parameter(torch.zeros(5)), REPLACEMENT, gradients(0.3, 0.2))
    assert "AdamW does not hold the values of a delta" in caplog.text
    assert torch.equal(optimizer.state[p]["exp_avg"], before["state"][0]["exp_avg"])


class Extended(optim.AdamW):
    """A known optimizer with state of its own: a slow mean, moments stacked, and a list of them."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                numbers = torch.arange(1.0, 6.0)
                self.state[p].update(
                    slow=numbers, stacked=torch.stack([numbers, 10 * numbers]), parts=[numbers.clone(), -numbers]
                )
        return loss


def test_state_that_a_subclass_adds_is_carried_and_named(caplog: pytest.LogCaptureFixture) -> None:
    optimizer, p = trained(Extended)
    moment = optimizer.state[p]["exp_avg"].clone()
    with caplog.at_level(logging.WARNING, logger="peft_sparse"):
        reindex(optimizer, p, REPLACEMENT, gradients(0.3, 0.2))
    state = optimizer.state[p]
    expected = REPLACEMENT.carry(torch.arange(1.0, 6.0))
    assert torch.equal(state["slow"], expected)
    assert torch.equal(state["stacked"], torch.stack([expected, 10 * expected]))
    assert torch.equal(state["parts"][0], expected)
    assert torch.equal(state["parts"][1], -expected)
    # What its base class does is known, and seeded.
    assert torch.equal(state["exp_avg"][[1, 2, 4]], REPLACEMENT.carry(moment)[[1, 2, 4]])
    assert bool((state["exp_avg"][GROWN] != 0).all())
    assert "Extended is an optimizer whose state is unknown here" in caplog.text
    assert "its slow and stacked and parts start at zero" in caplog.text


class BitsAndBytes(optim.Optimizer):
    """As bitsandbytes' AdEMAMix keeps its state: two means stacked, in 32 bits or in blocks of 8."""

    optimizer_name = "ademamix"

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {"lr": LR, "betas": (0.9, 0.999, 0.9999)})


BitsAndBytes.__module__ = "bitsandbytes.optim.ademamix"


@pytest.mark.parametrize("is_quantized", [False, True])
def test_both_means_of_ademamix_are_carried(is_quantized: bool) -> None:
    k = 600
    old = torch.arange(0, 2 * k, 2, dtype=torch.int32)
    drop = torch.ones(k)
    drop[:2] = 0
    grow = Candidates(torch.tensor([1, 999], dtype=torch.int32), torch.tensor([1.0, 2.0]))
    replacement = drop_and_grow(old, drop, grow, num_replaced=2)
    p = nn.Parameter(torch.zeros(k))
    optimizer = BitsAndBytes([p])
    moments = torch.stack([torch.linspace(-1, 1, k), torch.linspace(2, -2, k)])
    second = torch.linspace(0.1, 1, k)
    state: dict[str, Any] = {"step": 3, "state2": second.clone()}
    if is_quantized:
        book = torch.linspace(-1, 1, 256)
        codes, units = zip(*(quantize(row, book) for row in moments), strict=True)
        state.update(state1=torch.stack(codes), absmax1=torch.stack(units), qmap1=book)
    else:
        state["state1"] = moments.clone()
    optimizer.state[p] = state
    reindex(optimizer, p, replacement, gradients(0.5, 0.25))
    found = optimizer.state[p]["state1"]
    if is_quantized:
        assert found.dtype == torch.uint8
        assert found.shape == (2, k)
        assert optimizer.state[p]["absmax1"].shape == (2, 3)
        found = torch.stack(
            [dequantize(row, unit, book) for row, unit in zip(found, optimizer.state[p]["absmax1"], strict=True)]
        )
    expected = torch.stack([replacement.carry(moments[0], 0.5 * (1 - 0.9**3)), replacement.carry(moments[1], 0.0)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 if is_quantized else 1e-6)
    torch.testing.assert_close(
        optimizer.state[p]["state2"], replacement.carry(second, 0.25 * (1 - 0.999**3)), rtol=1e-5, atol=0
    )

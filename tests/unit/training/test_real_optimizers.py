"""SpIEL under wrapped, several, piecewise and scaled optimizers, and with closures: each update counts once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from peft_sparse import SparseAdamW, iter_deltas, iter_reselectors
from peft_sparse.errors import ConfigError
from tests.support.reselection import (
    METHODS,
    QUICK,
    batch,
    data,
    driver,
    make,
    optimizer_of,
    shared,
    train,
)
from tests.support.training import assert_same_tensors, deltas


class Foreign:
    """Three steps forward and one half back, around another optimizer; torch knows nothing of it."""

    def __init__(self, inner) -> None:
        self.inner, self.count = inner, 0
        self.param_groups, self.state = inner.param_groups, {}
        self.begin()

    def begin(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"slow": p.detach().clone()}

    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % 3 == 0:
            for p, state in self.state.items():
                state["slow"].lerp_(p.detach(), 0.5)
                p.data.copy_(state["slow"])
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


class Lookahead(Foreign, Optimizer):
    """The same as an optimizer of torch's, whose hooks see its steps."""

    def __init__(self, inner) -> None:
        self.inner, self.count = inner, 0
        Optimizer.__init__(self, [p for g in inner.param_groups for p in g["params"]], {"lr": 1.0})
        self.begin()


class Verbose(SparseAdamW):
    """A subclass whose step calls that of its base."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("cls", [Foreign, Lookahead])
def test_an_optimizer_around_another_counts_once_and_both_states_move(cls):
    """The slow weights of every position go with it, and those of grown weights are zero."""
    model = make()
    optimizer = cls(optimizer_of(model, SparseAdamW))
    for step in range(11):
        model(**batch(step)).loss.backward()
        before = deltas(model)
        slow = {name: optimizer.state[d.values]["slow"].clone() for name, _, _, d in iter_deltas(model)}
        optimizer.step()
        optimizer.zero_grad()
        for name, _, _, delta in iter_deltas(model):
            now, _ = deltas(model)[name]
            stays = torch.isin(now, before[name][0])
            state = optimizer.state[delta.values]["slow"]
            assert state.shape == now.shape
            if (step + 1) % 3:
                kept = torch.isin(before[name][0], now)
                assert torch.equal(state[stays], slow[name][kept])
                assert not state[~stays].any()
    assert driver(model).update == 11
    assert [r.update for r in driver(model).history] == [2, 6, 10]


def test_a_subclass_that_calls_its_base_counts_once():
    model, other = make(), make()
    train(model, optimizer_of(model, Verbose), range(9))
    train(other, optimizer_of(other, SparseAdamW), range(9))
    assert driver(model).update == 9
    assert_same_tensors(deltas(model), deltas(other))


def test_accelerates_optimizer_counts_once():
    model, other = make(), make()
    optimizer = Accelerator(cpu=True).prepare(optimizer_of(model, SparseAdamW))
    train(model, optimizer, range(9))
    train(other, optimizer_of(other, SparseAdamW), range(9))
    assert driver(model).update == 9
    assert_same_tensors(deltas(model), deltas(other))


class Hidden(Lookahead):
    """Slow weights in a list of its own."""

    def __init__(self, inner) -> None:
        super().__init__(inner)
        self.slow_weights = [[p.detach().clone() for p in group["params"]] for group in inner.param_groups]


def test_state_that_cannot_be_carried_is_refused():
    model = make()
    with pytest.raises(ConfigError, match=r"Hidden\.slow_weights holds tensors like the values"):
        train(model, Hidden(optimizer_of(model)), range(3))


class EveryOther(Optimizer):
    """Makes an update in every second step alone."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {"lr": 1e-2})
        self.calls = 0

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        if self.calls % 2 == 0:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=-group["lr"])


def test_steps_that_change_nothing_are_not_counted():
    model = make()
    train(model, EveryOther([p for p in model.parameters() if p.requires_grad]), range(8))
    assert driver(model).update == 4


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_scaler_and_a_fused_optimizer_count_what_was_updated(cls):
    """The same weights as a loop in which the overflow never was, with seeds in the optimizer's own units."""

    def run(scale):
        model = make()
        optimizer = cls([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, backoff_factor=1.0 - 1e-9, enabled=scale)
        for step in range(8):
            for is_lost in (True, False) if scale and step in (1, 2, 5) else (False,):
                loss = scaler.scale(model(**batch(step)).loss)
                (loss * float("inf") if is_lost else loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        return model

    scaled, plain = run(True), run(False)
    assert driver(scaled).update == driver(plain).update == 8
    assert [r.update for r in driver(scaled).history] == [2, 6]
    for name, (indices, values) in deltas(plain).items():
        assert torch.equal(deltas(scaled)[name][0], indices)
        torch.testing.assert_close(deltas(scaled)[name][1], values, rtol=1e-4, atol=1e-6)


def split(model):
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [p for n, p in named if "attention" in n], [p for n, p in named if "attention" not in n]


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("how", ["step step zero", "step zero step zero", "to zero"])
def test_several_optimizers_are_as_good_as_one(cls, how):
    together, apart = make(cls), make(cls)
    single = optimizer_of(together, SparseAdamW)
    train(together, single, range(11))
    optimizers = [SparseAdamW(part, lr=1e-2) for part in split(apart)]
    for step in range(11):
        apart(**batch(100 * step)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            if how == "step zero step zero":
                optimizer.zero_grad()
        apart.zero_grad(set_to_none=how != "to zero")
    assert driver(apart).update == 11
    assert_same_tensors(deltas(together), deltas(apart))
    moments = [
        {n: optimizer.state[d.values]["exp_avg"] for n, _, _, d in iter_deltas(model) if d.values in optimizer.state}
        for model, optimizer in ((together, single), (apart, optimizers[0]), (apart, optimizers[1]))
    ]
    assert all(torch.equal(moments[0][name], part[name]) for part in moments[1:] for name in part)
    assert len(moments[1]) + len(moments[2]) == len(moments[0])


def test_optimizers_that_step_at_different_rates_are_refused():
    model = make()
    often, seldom = (SparseAdamW(part, lr=1e-2) for part in split(model))

    def run():
        for step in range(10):
            model(**batch(step)).loss.backward()
            often.step()
            often.zero_grad()
            if step % 2:
                seldom.step()
                seldom.zero_grad()

    with pytest.raises(ConfigError, match="do not step equally often"):
        run()


def test_an_optimizer_of_a_part_leaves_the_rest_alone():
    model = make()
    part, rest = split(model)
    optimizer = SparseAdamW(part, lr=1e-2)
    for step in range(11):
        model(**batch(step)).loss.backward()
        optimizer.step()
        model.zero_grad()
    assert driver(model).update == 11
    assert [r.update for r in driver(model).history] == [2, 6, 10]
    grown = driver(model).grown_at()
    assert any(bool(at.any()) for name, at in grown.items() if "attention" in name)
    assert not any(bool(at.any()) for name, at in grown.items() if "attention" not in name)
    assert not any(bool(p.any()) for p in rest)


def test_an_optimizer_for_each_parameter_may_step_in_the_backward_pass():
    together, within = make(), make()
    train(together, optimizer_of(together, SparseAdamW), range(11))
    for p in within.parameters():
        if p.requires_grad:
            optimizer = SparseAdamW([p], lr=1e-2)

            def step(p, optimizer=optimizer):
                optimizer.step()
                optimizer.zero_grad()

            p.register_post_accumulate_grad_hook(step)
    for step in range(11):
        within(**batch(100 * step)).loss.backward()
    assert driver(within).update == 11
    assert_same_tensors(deltas(together), deltas(within))


def test_stepping_in_pieces_of_a_backward_pass_is_refused():
    model = shared()
    model.get_base_model().reentrant = True
    values = next(d.values for name, _, _, d in iter_deltas(model) if "inner" in name)
    optimizer = torch.optim.SGD([values], lr=0.1)
    values.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    with pytest.raises(ConfigError, match="use_reentrant"):
        model(data(0)).square().mean().backward()


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_adapters_that_take_turns_count_their_own(cls, set_to_none):
    model = make(cls)
    model.add_adapter("other", cls(**QUICK, seed=3))
    parameters = [d.values for name in ("default", "other") for *_, d in iter_deltas(model, name)]
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    for step in range(14):
        model.set_adapter("other" if step % 3 == 0 else "default")
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    counts = {r.adapter_name: r.update for r in iter_reselectors(model)}
    assert counts == {"default": 9, "other": 5}


def test_lbfgs_is_refused():
    model = shared()
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad])

    def closure():
        optimizer.zero_grad()
        loss = model(data(0)).square().mean()
        loss.backward()
        return loss

    with pytest.raises(ConfigError, match="LBFGS cannot train adapter 'default'"):
        optimizer.step(closure)


@pytest.mark.parametrize("cls", METHODS)
def test_a_closure_is_a_plain_step(cls):
    plain, closed = make(cls), make(cls)
    train(plain, optimizer_of(plain), range(9))
    optimizer = optimizer_of(closed)
    for step in range(9):

        def closure(step=step):
            optimizer.zero_grad()
            loss = closed(**batch(100 * step)).loss
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_same_tensors(deltas(plain), deltas(closed))

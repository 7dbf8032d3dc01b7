from __future__ import annotations

import copy
import gc

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_sparse import LotteryTicketConfig, RandConfig, iter_deltas
from peft_sparse.optim import l1 as regularization
from peft_sparse.training.phases.lottery import start_dense_phase
from tests.support.training import deltas, make_adapted, make_trainer

L1 = 2.0
# 5 * 4 + 4 weights in the tuned layer, 4 * 3 + 3 in the head, 7 frozen.
N = 46


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 4)
        self.outer = nn.Linear(4, 3)
        self.frozen = nn.Parameter(torch.zeros(7))
        self.config = {"model_type": "small"}

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


def make(*, l1=L1, dtype=torch.float32, config_class=RandConfig, **changes):
    torch.manual_seed(0)
    settings = {"num_weights": 8, "target_modules": ["inner"], "modules_to_save": ["outer"], "l1": l1, **changes}
    return get_peft_model(Small().to(dtype), config_class(**settings))


def batches(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def the_delta(model, adapter_name="default"):
    return next(delta for _, _, _, delta in iter_deltas(model, adapter_name))


def oracle(model, data, make_optimizer, *, accumulation=1, l1=L1):
    """The regularised objective itself, in float64, by autograd on a dense copy of the model."""
    delta = the_delta(model)
    inner, outer = (
        model.base_model.model.inner.get_base_layer(),
        model.base_model.model.outer.modules_to_save["default"],
    )
    weight, bias = inner.weight.detach().double(), inner.bias.detach().double()
    values = delta.values.detach().double().requires_grad_()
    head = [p.detach().double().clone().requires_grad_() for p in (outer.weight, outer.bias)]
    optimizer = make_optimizer([values, *head])
    for i, x in enumerate(data):
        dense = (weight.flatten().index_add(0, delta.indices.long(), values)).view_as(weight)
        out = torch.tanh(x.double() @ dense.t() + bias) @ head[0].t() + head[1]
        objective = out.square().mean() / accumulation
        if i % accumulation == 0:
            objective = objective + l1 / N * values.abs().sum()
        objective.backward()
        if (i + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    return values.detach()


def train(model, data, make_optimizer, *, accumulation=1):
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    for i, x in enumerate(data):
        (model(x).square().mean() / accumulation).backward()
        if (i + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.5),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_loop_minimises_the_regularised_objective(name, accumulation):
    model = make()
    # A start away from zero, where the sign is not zero.
    the_delta(model).values.data.copy_(torch.linspace(-0.4, 0.6, 8))
    data = batches(12)
    expected = oracle(model, data, OPTIMIZERS[name], accumulation=accumulation)
    unregularised = oracle(model, data, OPTIMIZERS[name], accumulation=accumulation, l1=0.0)
    train(model, data, OPTIMIZERS[name], accumulation=accumulation)
    found = the_delta(model).values.detach().double()
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (found - unregularised).norm() > 1e-2 * expected.norm()


def test_no_penalty_without_l1():
    model = make(l1=0.0)
    data = batches(6)
    expected = oracle(model, data, OPTIMIZERS["sgd"], l1=0.0)
    train(model, data, OPTIMIZERS["sgd"])
    assert (the_delta(model).values.detach().double() - expected).norm() < 1e-5 * expected.norm()


def test_two_models_and_two_adapters_keep_apart():
    one, other = make(), make(l1=0.0)
    one.add_adapter("stronger", RandConfig(num_weights=8, target_modules=["inner"], l1=10 * L1, seed=4))
    data = batches(6)
    for model in (one, other):
        the_delta(model).values.data.fill_(0.5)
    expected = oracle(one, data, OPTIMIZERS["sgd"])
    expected_other = oracle(other, data, OPTIMIZERS["sgd"], l1=0.0)
    parameters = [p for model in (one, other) for p in model.parameters() if p.requires_grad]
    # One optimizer over both models, each stepping as it would alone.
    optimizer = OPTIMIZERS["sgd"](parameters)
    for x in data:
        for model in (one, other):
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (the_delta(one).values.detach().double() - expected).norm() < 1e-5 * expected.norm()
    assert (the_delta(other).values.detach().double() - expected_other).norm() < 1e-5 * expected_other.norm()
    assert not the_delta(one, "stronger").values.any()


def test_copies_and_pickles_are_penalised_as_well():
    model = make()
    the_delta(model).values.data.fill_(0.5)
    twin = copy.deepcopy(model)
    data = batches(6)
    expected = oracle(model, data, OPTIMIZERS["sgd"])
    train(twin, data, OPTIMIZERS["sgd"])
    assert (the_delta(twin).values.detach().double() - expected).norm() < 1e-5 * expected.norm()


def test_loaded_adapters_are_penalised_as_well(tmp_path):
    from peft import PeftModel

    model = make()
    the_delta(model).values.data.fill_(0.5)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Small(), tmp_path, is_trainable=True)
    data = batches(6)
    expected = oracle(model, data, OPTIMIZERS["sgd"])
    train(loaded, data, OPTIMIZERS["sgd"])
    assert (the_delta(loaded).values.detach().double() - expected).norm() < 1e-5 * expected.norm()


def test_the_hook_goes_with_the_last_penalised_adapter():
    gc.collect()
    other = nn.Parameter(torch.ones(3))

    def step():
        other.grad = torch.zeros(3)
        torch.optim.SGD([other], lr=1.0).step()

    step()
    watched = len(regularization.penalised)
    model = make()
    assert len(regularization.penalised) == watched + 1
    assert regularization.penalised._hook is not None
    step()
    assert torch.equal(other, torch.ones(3))
    model.add_adapter("other", RandConfig(num_weights=8, target_modules=["inner"]))
    model.delete_adapter("default")
    gc.collect()
    assert len(regularization.penalised) == watched
    del model
    gc.collect()
    # Whatever died is gone, also while several kinds of hooks are there.
    step()
    assert torch.equal(other, torch.ones(3))
    regularization.penalised.discard(other)
    assert (regularization.penalised._hook is not None) == (watched > 0)


def test_dense_phase_pulls_the_targets_to_where_they_started():
    model = make(config_class=LotteryTicketConfig)
    data = batches(6)
    inner, outer = (
        model.base_model.model.inner.get_base_layer(),
        model.base_model.model.outer.modules_to_save["default"],
    )
    original = inner.weight.detach().double()
    weight, bias = original.clone().requires_grad_(), inner.bias.detach().double()
    head = [p.detach().double().clone().requires_grad_() for p in (outer.weight, outer.bias)]
    optimizer = torch.optim.SGD([weight, *head], lr=0.3)
    for x in data:
        out = torch.tanh(x.double() @ weight.t() + bias) @ head[0].t() + head[1]
        (out.square().mean() + L1 / N * (weight - original).abs().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    phase = start_dense_phase(model)
    train(model, data, lambda parameters: torch.optim.SGD(parameters, lr=0.3))
    difference = inner.weight.detach().double() - original
    assert (difference - (weight.detach() - original)).norm() < 1e-4 * (weight.detach() - original).norm()
    penalty = sum(pull.penalty() for pull in phase.pulls())
    assert penalty == pytest.approx(L1 / N * float(difference.abs().sum()), rel=1e-5)
    watched = len(regularization.penalised)
    phase.abort()
    assert len(regularization.penalised) == watched - 1


class Around(torch.optim.Optimizer):
    """An optimizer around another; torch tells of the steps of both."""

    def __init__(self, inner):
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


class Sub(torch.optim.SGD):
    """A subclass, of whose steps torch tells twice."""

    def step(self, closure=None):
        return super().step(closure)


class Blind(Around):
    """One that keeps its inner optimizer where nobody finds it."""

    def __init__(self, inner):
        torch.optim.Optimizer.__init__(self, [p for group in inner.param_groups for p in group["params"]], {})
        self.call = lambda closure: inner.step(closure)

    def step(self, closure=None):
        return self.call(closure)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.5)


WAYS = {
    "plain": sgd,
    "around": lambda parameters: Around(sgd(parameters)),
    "around twice": lambda parameters: Around(Around(sgd(parameters))),
    "blind": lambda parameters: Blind(sgd(parameters)),
    "subclass": lambda parameters: Sub(parameters, lr=0.3, momentum=0.5),
    "subclass around": lambda parameters: Around(Sub(parameters, lr=0.3, momentum=0.5)),
}


@pytest.mark.parametrize("kind", [RandConfig, LotteryTicketConfig])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_penalty_is_applied_once_whatever_calls_the_step(way, closed, kind):
    """In the dense phase as well, against the plain loop."""

    def run(make_optimizer, closed):
        torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)  # so that torch has its mark on the base class
        model = make(config_class=kind, l1=20.0)
        if kind is LotteryTicketConfig:
            phase = start_dense_phase(model)
        else:
            the_delta(model).values.data.copy_(torch.linspace(-0.4, 0.6, 8))
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
        for x in batches(5):

            def closure(x=x):
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            if closed:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        result = {n: p.detach().clone() for n, p in model.named_parameters()}
        if kind is LotteryTicketConfig:
            phase.abort()
        return result

    expected, found = run(sgd, False), run(WAYS[way], closed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_line_search_sees_the_penalty():
    """L-BFGS does what it does with the penalty written into the loss."""

    def run(l1, written):
        model = make(l1=l1, modules_to_save=None, dtype=torch.float64, values_dtype="float32")
        values = the_delta(model).values
        values.data.fill_(0.3)
        optimizer = torch.optim.LBFGS([values], max_iter=8, line_search_fn="strong_wolfe")
        x = batches(1, torch.float64)[0]

        def closure():
            optimizer.zero_grad()
            loss = model(x).square().mean() + written / N * values.abs().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return values.detach()

    found, expected = run(4.0, 0.0), run(0.0, 4.0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert (found - run(0.0, 0.0)).abs().max() > 1e-2


def test_an_adapter_whose_turn_it_is_not_is_not_pulled():
    model = make()
    model.add_adapter("other", RandConfig(num_weights=8, target_modules=["inner"], l1=L1, seed=4))
    first, second = the_delta(model).values, the_delta(model, "other").values
    first.data.fill_(0.5)
    optimizer = torch.optim.SGD([first, second], lr=0.1)
    for name, moves in (("default", True), ("other", False)):
        model.set_adapter(name)
        before = first.detach().clone()
        model(batches(1)[0]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        assert torch.equal(first, before) != moves


def test_a_gradient_that_is_scaled_until_the_step_gets_a_scaled_penalty():
    model = make()
    values = the_delta(model).values
    values.data.fill_(0.5)
    values.grad = torch.zeros_like(values)
    # What GradScaler.step does with an optimizer that unscales within its own step.
    optimizer = torch.optim.SGD([values], lr=1.0, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    optimizer.step()
    assert torch.allclose(values, torch.full((8,), 0.5 - L1 / N))


def test_the_trainer_logs_the_penalty_in_both_phases(tmp_path):
    trainer = make_trainer(tmp_path, model=make_adapted(l1=5.0), max_steps=3, dense_args={"max_steps": 2})
    numel = sum(
        p.numel() for n, p in trainer.model.named_parameters() if "sparse_ft" not in n and "modules_to_save" not in n
    )
    trainer.train()
    dense = [entry["l1_loss"] for entry in trainer.dense_state.log_history if "loss" in entry]
    sparse = [entry["l1_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(dense) == 2
    assert min(dense) > 0
    expected = 5.0 / numel * sum(float(values.abs().sum()) for _, values in deltas(trainer.model).values())
    assert sparse[-1] == pytest.approx(expected, rel=1e-5)
    without = make_trainer(tmp_path, max_steps=1, dense_args={"max_steps": 1})
    without.train()
    assert all("l1_loss" not in entry for entry in without.state.log_history)

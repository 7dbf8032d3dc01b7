"""What counts as an update of a SpIEL adapter, and what its window sums up: against dense gradients and plain loops."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from peft_sparse import SpielAGConfig, iter_deltas, iter_reselectors
from peft_sparse.errors import SelectionError
from tests.support.reselection import (
    METHODS,
    QUICK,
    Shared,
    batch,
    data,
    driver,
    make,
    optimizer_of,
    shared,
    train,
)
from tests.support.training import assert_same_tensors, deltas


def dense_gradient(base: Shared, steps) -> dict[str, torch.Tensor]:
    base.zero_grad()
    for step in steps:
        base(data(step)).square().mean().backward()
    return {name: p.grad.detach().clone().flatten() for name, p in base.named_parameters() if name.endswith("weight")}


def estimates(model) -> dict[str, Any]:
    return {name: delta.observer.estimate for name, _, _, delta in iter_deltas(model)}


@pytest.mark.parametrize("reentrant", [None, False])
@pytest.mark.parametrize("how", ["uses", "two losses", "accumulated"])
def test_all_uses_of_a_layer_are_in_the_sums_and_in_the_nomination(how, reentrant):
    model = shared(candidates_per_weight=1.0)
    torch.manual_seed(0)
    base = Shared()
    model.get_base_model().reentrant = reentrant
    optimizer = optimizer_of(model, torch.optim.SGD, lr=0.0)
    first = total = None
    for update in range(2):
        steps = [10 * update] if how == "uses" else [10 * update, 10 * update + 1]
        if how == "two losses":
            sum(model(data(step)).square().mean() for step in steps).backward()
        else:
            for step in steps:
                model(data(step)).square().mean().backward()
        # A backward pass nominates: of two losses in one, both.
        nominating = steps[:1] if how == "accumulated" else steps
        first = dense_gradient(base, nominating) if first is None else first
        found = dense_gradient(base, steps)
        total = found if total is None else {name: total[name] + found[name] for name in found}
        optimizer.step()
        optimizer.zero_grad()
    for name, estimate in estimates(model).items():
        assert estimate.updates == 2
        torch.testing.assert_close(estimate.total, total[name][estimate.indices.long()], rtol=1e-4, atol=1e-6)
        count = int(estimate.nominated.sum())
        expected = first[name].abs().topk(count).indices.sort().values
        assert torch.equal(estimate.indices[estimate.nominated].long(), expected), name


def test_reentrant_checkpointing_sums_all_uses():
    model = shared()
    torch.manual_seed(0)
    base = Shared()
    model.get_base_model().reentrant = True
    model(data(0)).square().mean().backward()
    optimizer_of(model, torch.optim.SGD, lr=0.0).step()
    expected = dense_gradient(base, [0])
    for name, estimate in estimates(model).items():
        torch.testing.assert_close(estimate.total, expected[name][estimate.indices.long()], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("when", ["before", "after"])
def test_gradients_that_no_optimizer_will_see_are_not_counted(when):
    """A gradient penalty, or a look at the inputs' gradient, goes through the layers and accumulates nothing."""
    plain, looking = shared(), shared()
    for model in (plain, looking):
        optimizer = optimizer_of(model, torch.optim.SGD, lr=0.1)
        for step in range(2):
            x = data(step)

            def look(step=step, model=model):
                if model is looking:
                    y = data(50 + step)
                    torch.autograd.grad(model(y).square().sum(), y)

            if when == "before":
                look()
            model(x).square().mean().backward()
            if when == "after":
                look()
            optimizer.step()
            optimizer.zero_grad()
    for name, estimate in estimates(looking).items():
        assert torch.equal(estimate.total, estimates(plain)[name].total)


def test_gradients_put_in_by_hand_are_counted():
    plain, by_hand = shared(), shared()
    for model in (plain, by_hand):
        optimizer = optimizer_of(model, torch.optim.SGD, lr=0.1)
        parameters = [p for p in model.parameters() if p.requires_grad]
        for step in range(5):
            loss = model(data(step)).square().mean()
            if model is plain:
                loss.backward()
            else:
                for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    p.grad = g
            optimizer.step()
            optimizer.zero_grad()
    assert [r.update for r in driver(by_hand).history] == [3]
    assert_same_tensors(deltas(plain), deltas(by_hand))


# ---- not a number --------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_update_on_gradients_that_are_not_finite_is_an_error_at_once(cls, factor, at):
    model = make(cls)
    optimizer = optimizer_of(model)
    for step in range(at):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (model(**batch(at)).loss * factor).backward()
    with pytest.raises(SelectionError, match=rf"update {at + 1} of adapter 'default' was made with a gradient .* NaN"):
        optimizer.step()


@pytest.mark.parametrize("cls", METHODS)
def test_a_scaler_that_skips_is_no_error(cls):
    model = make(cls)
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(8):
        loss = scaler.scale(model(**batch(step)).loss)
        (loss * float("nan") if step in (0, 3) else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert driver(model).update == 6


class Careful(torch.optim.AdamW):
    """Leaves out updates whose gradients are not finite."""

    def step(self, closure: Any = None) -> Any:
        if all(bool(torch.isfinite(p.grad).all()) for g in self.param_groups for p in g["params"]):
            super().step(closure)


def test_an_optimizer_may_skip_by_itself():
    model = make()
    optimizer = optimizer_of(model, Careful)
    for step in range(8):
        loss = model(**batch(step)).loss
        (loss * float("nan") if step in (0, 3) else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert driver(model).update == 6
    assert [r.update for r in driver(model).history] == [2, 6]


# ---- copies --------------------------------------------------------------------------------------


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_copy_goes_on_by_itself_as_the_original_does(cls, how, at):
    model = make(cls)
    train(model, optimizer_of(model, torch.optim.SGD, lr=0.1), range(at))
    twin = how(model)
    kept = copy.deepcopy(driver(model).state_dict())
    state = driver(twin).state_dict()
    assert state.keys() == kept.keys()
    train(twin, optimizer_of(twin, torch.optim.SGD, lr=0.1), range(at, 7))
    assert driver(model).update == at
    assert all(torch.equal(tensor, kept[key]) for key, tensor in driver(model).state_dict().items())
    train(model, optimizer_of(model, torch.optim.SGD, lr=0.1), range(at, 7))
    assert_same_tensors(deltas(twin), deltas(model))
    assert [r.update for r in driver(twin).history] == [2, 6]


def test_a_copied_layer_alone_is_not_watched():
    model = make()
    layer = copy.deepcopy(next(layer for _, layer, _, _ in iter_deltas(model)))
    assert all(delta.observer is None for delta in layer.deltas_of("weight").values())


# ---- frozen, and of another size -------------------------------------------------------------------


def test_a_frozen_adapter_is_neither_watched_nor_counted():
    model = make()
    model.add_adapter("other", SpielAGConfig(**QUICK, seed=3))
    model.base_model.set_adapter(["default", "other"])
    model.base_model.set_requires_grad("other", requires_grad=False)
    assert all(delta.observer is None for _, _, _, delta in iter_deltas(model, "other"))
    train(model, optimizer_of(model), range(3))
    counts = {r.adapter_name: r.update for r in iter_reselectors(model)}
    assert counts == {"default": 3, "other": 0}
    other = next(r for r in iter_reselectors(model) if r.adapter_name == "other")
    assert not any(key.startswith("window") for key in other.state_dict())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_global_budget_keeps_the_parameters_that_others_hold(set_to_none):
    model = make(budget="global", total_steps=40)
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = {id(p): p.numel() for p in parameters}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for step in range(12):
        # The loss, and with it the graph, outlives the reselection.
        loss = model(**batch(step)).loss
        losses.append(loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in parameters]
    assert {id(p): p.numel() for p in parameters} != before
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in parameters)
    assert len(driver(model).history) == 3

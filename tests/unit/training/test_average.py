"""Averages of an adapter whose support changes: by position, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from peft_sparse import AdapterAverage, SpielMAConfig, iter_deltas
from peft_sparse.errors import ConfigError, SelectionError
from peft_sparse.training.spiel.reselector import iter_reselectors
from tests.support.reselection import batch, make, optimizer_of


def dense(model, adapter_name="default"):
    return {name: d.delta.to_dense().double().detach() for name, _, _, d in iter_deltas(model, adapter_name)}


@pytest.mark.parametrize("decay", [None, 0.7])
@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_the_average_is_that_of_dense_differences(decay, budget):
    model = make(budget=budget, total_steps=40)
    optimizer = optimizer_of(model)
    average = AdapterAverage(model, decay=decay)
    expected = None
    for step in range(8):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        now = dense(model)
        share = 1 / (step + 1) if decay is None or step == 0 else 1 - decay
        expected = now if expected is None else {n: (1 - share) * expected[n] + share * now[n] for n in now}
    (driver,) = iter_reselectors(model)
    assert len(driver.history) == 2
    found = average.deltas()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].to_dense().double(), tensor, rtol=1e-5, atol=1e-8)
    average.add_to(model, "averaged")
    assert model.active_adapters == ["default"]
    for name, tensor in dense(model, "averaged").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-8)
    assert not any(d.values.requires_grad for _, _, _, d in iter_deltas(model, "averaged"))


def test_what_cannot_be_averaged_is_refused():
    model = make()
    for decay in (1.0, -0.1):
        with pytest.raises(ConfigError, match="decay must be in"):
            AdapterAverage(model, decay=decay)
    with pytest.raises(ConfigError, match="adapter_name must be a sparse adapter"):
        AdapterAverage(model, "nobody")
    average = AdapterAverage(model)
    with pytest.raises(ConfigError, match="nothing to average yet"):
        average.add_to(model, "averaged")
    average.update()
    with pytest.raises(ConfigError, match="must be a new one"):
        average.add_to(model, "default")


@pytest.mark.parametrize("how", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}])
@pytest.mark.parametrize("look", ["forward", "state", "move"])
def test_torchs_averaged_model_is_refused_once_the_support_has_changed(how, look):
    model = make(SpielMAConfig)
    optimizer = optimizer_of(model)
    averaged = AveragedModel(model, **how)
    for step in range(3):
        if step < 2:
            averaged.update_parameters(model)
            assert averaged.module(**batch(0)).logits.isfinite().all()
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (driver,) = iter_reselectors(model)
    assert len(driver.history) == 1
    averaged.update_parameters(model)
    looks = {
        "forward": lambda: averaged.module(**batch(0)),
        "state": lambda: averaged.module.state_dict(),
        "move": lambda: averaged.to(torch.float64),
    }
    with pytest.raises(SelectionError, match="AdapterAverage averages by"):
        looks[look]()


def test_a_copy_may_be_moved_loaded_and_trained():
    model = make()
    optimizer = optimizer_of(model)
    twin = copy.deepcopy(model)
    for step in range(3):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    twin.load_state_dict(model.state_dict())
    expected = model(**batch(7)).logits
    assert torch.equal(twin(**batch(7)).logits, expected)
    assert torch.allclose(twin.double()(**batch(7)).logits.float(), expected, atol=1e-4)

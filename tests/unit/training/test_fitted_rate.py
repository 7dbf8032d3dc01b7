"""Steps are scaled by what their support does to the layer's output, in any loop, and follow a support that changes."""

from __future__ import annotations

import copy
import math
import shutil

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer

from peft_sparse import (
    GivenConfig,
    OneShotConfig,
    RandConfig,
    SparseTrainer,
    SpielAGConfig,
    iter_deltas,
    iter_reselectors,
    rate_scales,
)
from peft_sparse.errors import ConfigError, FormatError
from peft_sparse.optim.step_scale import _before
from peft_sparse.selection.output_energy import step_scale
from peft_sparse.training.fitted_rate import iter_rate_fits
from peft_sparse.training.spiel.callback import STATE_FILE
from peft_sparse.training.spiel.callback import resume as resume_state
from tests.support.training import Labelled, make_args, make_bert

BATCHES = [{"input_ids": row["input_ids"][None], "labels": row["labels"][None]} for row in Labelled(8)]


class TwoLayers(nn.Module):
    """Two linear layers, with inputs of very different size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def inputs(seed, rows=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator) * torch.tensor([0.1, 0.2, 0.5, 1.0, 4.0, 9.0])


SUPPORT = {"first.weight": [4, 5, 11, 14], "second.weight": [0, 7, 19]}


def trained(fitted, *, updates, optimizer=torch.optim.SGD, **options):
    """The tuned values after every update, and the model."""
    model = get_peft_model(TwoLayers(), GivenConfig(support=SUPPORT, fitted_rate=fitted))
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1, **options)
    history = []
    for update in range(updates):
        optimizer.zero_grad()
        model(inputs(update)).square().mean().backward()
        optimizer.step()
        history.append({name: d.values.detach().double().clone() for name, _, _, d in iter_deltas(model)})
    return model, history


def test_a_scale_is_the_ratio_of_output_energies():
    generator = torch.Generator().manual_seed(1)
    energies = torch.rand(7, generator=generator) * 10
    x = torch.randn(100_000, 7, generator=generator, dtype=torch.float64) * energies.double().sqrt()
    indices = torch.tensor([3, 10, 13, 20, 34])
    for transposed, shape in ((False, (5, 7)), (True, (7, 5))):

        def output_energy(flat, shape=shape, transposed=transposed):
            weight = torch.zeros(35, dtype=torch.float64)
            # A sign for each weight, so that the energies of weights add up in the mean.
            weight[flat] = torch.randint(0, 2, (flat.numel(),), generator=generator).double() * 2 - 1
            dense = weight.view(shape).t() if transposed else weight.view(shape)
            return float((x @ dense.T).square().sum(1).mean()) / flat.numel()

        chosen = sum(output_energy(indices) for _ in range(8)) / 8
        expected = math.sqrt(output_energy(torch.arange(35)) / chosen)
        found = step_scale(energies, indices, shape, transposed=transposed)
        assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("energies", [torch.zeros(4), torch.full((4,), math.inf)])
def test_inputs_that_say_nothing_leave_steps_alone(energies):
    assert step_scale(energies, torch.tensor([1, 2]), (3, 4)) == 1.0
    assert step_scale(torch.tensor([1e-9, 1, 1, 1]), torch.tensor([0]), (3, 4)) == 4.0
    assert step_scale(torch.ones(4), torch.tensor([], dtype=torch.int32), (3, 4)) == 1.0


def test_steps_are_those_of_a_slow_reference():
    """SGD in float64, whose steps on each tensor are scaled by the inputs that were seen so far."""
    _, history = trained(True, updates=6)
    base = TwoLayers().double()
    values = {name: torch.zeros(len(flat), dtype=torch.float64) for name, flat in SUPPORT.items()}
    squares, tokens = dict.fromkeys(SUPPORT, 0.0), 0
    for update in range(6):
        x = inputs(update).double()
        weights = {name: base.get_parameter(name).detach().clone() for name in SUPPORT}
        for name, flat in SUPPORT.items():
            weights[name].view(-1)[flat] += values[name]
            weights[name].requires_grad_()
        hidden = torch.relu(nn.functional.linear(x, weights["first.weight"], base.first.bias))
        out = nn.functional.linear(hidden, weights["second.weight"], base.second.bias)
        out.square().mean().backward()
        if update < 4:
            tokens += len(x)
            squares["first.weight"] = squares["first.weight"] + x.square().sum(0)
            squares["second.weight"] = squares["second.weight"] + hidden.detach().square().sum(0)
        for name, flat in SUPPORT.items():
            energy = squares[name] / tokens
            columns = [i % weights[name].shape[1] for i in flat]
            scale = (energy.mean() / energy[columns].mean()).sqrt()
            values[name] -= 0.1 * scale * weights[name].grad.view(-1)[flat]
            torch.testing.assert_close(history[update][name], values[name], rtol=1e-4, atol=1e-7)
    assert not _before


def test_large_inputs_make_small_steps_and_a_random_support_is_left_nearly_alone():
    model, _ = trained(True, updates=1)
    scales = rate_scales(model)
    assert scales["first.weight"] < 0.7
    wide = get_peft_model(make_bert(dropout=0.0), RandConfig(density=0.9, fitted_rate=True, target_modules=["query"]))
    optimizer = torch.optim.SGD([p for p in wide.parameters() if p.requires_grad], lr=0.0)
    wide(**BATCHES[0]).loss.backward()
    optimizer.step()
    assert all(scale == pytest.approx(1, abs=0.1) for scale in rate_scales(wide).values())


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
def test_the_first_step_of_adaptive_optimizers_is_scaled(optimizer):
    model, fitted = trained(True, updates=1, optimizer=optimizer)
    _, plain = trained(False, updates=1, optimizer=optimizer)
    for name, scale in rate_scales(model).items():
        torch.testing.assert_close(fitted[0][name], plain[0][name] * scale, rtol=1e-5, atol=1e-9)


def test_without_the_option_nothing_is_measured_or_scaled():
    model, _ = trained(False, updates=1)
    assert rate_scales(model) == {}
    assert all(delta.meter is None for *_, delta in iter_deltas(model))


def test_evaluation_is_not_measured_and_measuring_ends():
    model, _ = trained(True, updates=3)
    (fit,) = model.base_model.model._sparse_ft_drivers["default"]
    meter = next(delta.meter for *_, delta in iter_deltas(model))
    seen = meter.tokens
    with torch.no_grad():
        model(inputs(9))
    assert meter.tokens == seen
    model, _ = trained(True, updates=4)
    assert all(delta.meter is None for *_, delta in iter_deltas(model))
    assert set(fit.energies) == set(SUPPORT)


def test_a_copy_scales_for_itself():
    model, _ = trained(True, updates=1)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    before = {name: d.values.detach().clone() for name, _, _, d in iter_deltas(twin)}
    twin(inputs(1)).square().mean().backward()
    optimizer.step()
    scales = rate_scales(twin)
    for name, _, _, delta in iter_deltas(twin):
        expected = before[name] - 0.1 * scales[name] * delta.values.grad
        torch.testing.assert_close(delta.values.detach(), expected, rtol=1e-5, atol=1e-8)
    assert rate_scales(model)["first.weight"] != scales["first.weight"]


@pytest.mark.parametrize("trainer", [Trainer, SparseTrainer])
def test_any_trainer_scales(tmp_path, trainer):
    model = get_peft_model(make_bert(dropout=0.0), RandConfig(density=0.02, fitted_rate=True))
    trainer(model=model, args=make_args(tmp_path, max_steps=3), train_dataset=Labelled()).train()
    scales = rate_scales(model).values()
    # Six matrices in each of two layers, the pooler, and the classifier.
    assert len(scales) == 14
    assert all(0.3 < s <= 4 for s in scales)
    assert len(set(scales)) > 5


def test_a_support_by_gradients_takes_smaller_steps_and_spiel_follows_its_support(tmp_path):
    model = get_peft_model(
        make_bert(dropout=0.0), OneShotConfig(density=0.02, criterion="gradient", budget="uniform", fitted_rate=True)
    )
    SparseTrainer(model=model, args=make_args(tmp_path, max_steps=2), train_dataset=Labelled()).train()
    scales = list(rate_scales(model).values())
    assert sum(scales) / len(scales) < 0.95
    model = get_peft_model(
        make_bert(dropout=0.0),
        SpielAGConfig(density=0.02, fitted_rate=True, reselection_steps=2, estimation_steps=2, total_steps=20),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    seen = []
    for batch in BATCHES[:3]:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        seen.append(rate_scales(model))
    (reselector,) = iter_reselectors(model)
    assert reselector.history[0].update == 2
    # Grown weights stand at zero after the reselection: a step that was scaled after it would have moved them.
    changed = [name for name in seen[0] if seen[1][name] != seen[0][name]]
    assert len(changed) > 5


def test_weights_that_were_just_grown_are_zero():
    # Torch calls hooks in the order in which they came: reselection's comes first here.
    earlier = get_peft_model(TwoLayers(), SpielAGConfig(density=0.2, task_type=None, target_modules=["first"]))
    model = get_peft_model(
        make_bert(dropout=0.0),
        SpielAGConfig(density=0.02, fitted_rate=True, reselection_steps=4, estimation_steps=2, total_steps=20),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in BATCHES[:2]:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert any(iter_reselectors(earlier))
    (reselector,) = iter_reselectors(model)
    grown = reselector.grown_at()
    assert sum(int((at == 2).sum()) for at in grown.values()) > 50
    for name, _, _, delta in iter_deltas(model):
        assert not delta.values.detach()[grown[name] == 2].any()
        assert delta.values.detach()[grown[name] == 0].all()


@pytest.mark.parametrize("trainer", [Trainer, SparseTrainer])
@pytest.mark.parametrize("save_at", [2, 5])
def test_a_resumed_run_scales_alike(tmp_path, trainer, save_at):
    def run(folder, resume=None):
        torch.manual_seed(5)
        model = get_peft_model(make_bert(dropout=0.0), RandConfig(density=0.02, fitted_rate=True))
        args = make_args(folder, max_steps=7, save_strategy="steps", save_steps=save_at)
        trainer(model=model, args=args, train_dataset=Labelled()).train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "a")
    again = run(tmp_path / "a", resume=str(tmp_path / "a" / f"checkpoint-{save_at}"))
    assert rate_scales(whole) == rate_scales(again)
    for (name, _, _, first), (_, _, _, second) in zip(iter_deltas(whole), iter_deltas(again), strict=True):
        assert torch.equal(first.values, second.values), name


@pytest.mark.parametrize("there", ["nothing", "another run's checkpoint", "one that lost its state"])
def test_a_plain_trainer_says_that_it_measures_anew(tmp_path, there, caplog):
    """Unless it finds the state of the checkpoint that it resumes from where its callback looks for it."""

    def run(folder, resume=None, **changes):
        torch.manual_seed(5)
        model = get_peft_model(make_bert(dropout=0.0), RandConfig(density=0.02, fitted_rate=True))
        args = make_args(folder, max_steps=7, save_strategy="steps", save_steps=5, **changes)
        Trainer(model=model, args=args, train_dataset=Labelled()).train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "whole")
    kept = tmp_path / "whole" / "checkpoint-5"
    looked_at = tmp_path / "out" / "checkpoint-5"
    if there == "another run's checkpoint":
        run(tmp_path / "out", data_seed=1)
    elif there == "one that lost its state":
        shutil.copytree(kept, looked_at)
        kept = looked_at
        (kept / STATE_FILE).unlink()
    again = run(tmp_path / "out", resume=str(kept))
    is_there = there == "another run's checkpoint"
    told = "belongs to other weights than those that were resumed, in" if is_there else "was not found in"
    assert f"{STATE_FILE} {told} {looked_at}: the inputs that fitted_rate looks at are measured anew." in caplog.text
    # What it measures are the updates that it makes itself.
    (fit,) = iter_rate_fits(again)
    assert {tuple(fit.state_dict()[f"counts.{name}"].tolist())[1] for name in fit.energies} == {2}
    assert rate_scales(again).keys() == rate_scales(whole).keys()
    assert rate_scales(again) != rate_scales(whole)
    # A model that has trained already forgets what it measured then.
    resume_state(again, make_args(tmp_path / "none"), 5)
    assert (fit.energies, set(rate_scales(again).values())) == ({}, {1.0})


def test_a_foreign_state_is_refused(tmp_path):
    model, _ = trained(True, updates=4)
    (fit,) = iter_rate_fits(model)
    state = fit.state_dict()
    state["energies.first.weight"] = torch.ones(7)
    with pytest.raises(FormatError, match=r"energies.first.weight' must hold 6 numbers >= 0, got shape \(7,\)"):
        fit.load_state_dict(state)


def test_a_senseless_value_is_refused():
    with pytest.raises(ConfigError, match="fitted_rate must be True or False, got '2e-3'"):
        RandConfig(density=0.1, fitted_rate="2e-3")

"""Criteria of gradients in a loop of one's own and in the trainer: what is chosen, what stays, what is refused."""

from __future__ import annotations

import copy
import json
import logging
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from peft_sparse import (
    ConfigError,
    FormatError,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SelectionError,
    iter_deltas,
    select_by_gradients,
    start_dense_phase,
)
from peft_sparse.training.trainer.trainer import SparseTrainer
from tests.support.training import Labelled, assert_same_tensors, base_weights, deltas, head, make_bert, make_trainer

BATCHES = [
    {key: torch.stack([Labelled(16)[i][key] for i in range(start, start + 4)]) for key in Labelled(1)[0]}
    for start in (0, 4, 8, 12)
]


def make(*, dropout=0.1, seed=0, **fields):
    settings = {"num_weights": 200, "selection_batches": 4, "modules_to_save": ["classifier"], **fields}
    return get_peft_model(make_bert(dropout=dropout, seed=seed), OneShotConfig(**settings))


def indices(model):
    return {name: chosen for name, (chosen, _) in deltas(model).items()}


# ---- in a loop of one's own --------------------------------------------------------------------------


def test_selects_k_and_leaves_everything_else_as_it_was():
    model = make(target_modules="all")
    model.base_model.model.register_buffer("running", torch.zeros(1))
    forwards = []

    def count(*args):
        forwards.append(model.base_model.model.running.add_(1).item())

    model.register_forward_hook(count)
    before, modes = base_weights(model), [module.training for module in model.modules()]
    head_weight = model.base_model.model.classifier.modules_to_save["default"].weight
    head_weight.grad = torch.ones_like(head_weight)
    state = torch.get_rng_state()
    chosen = select_by_gradients(model, BATCHES)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(map(len, chosen.values())) == 200
    assert model.peft_config["default"].counts == {name: len(found) for name, found in chosen.items()}
    assert_same_tensors(indices(model), chosen)
    assert_same_tensors(base_weights(model), before)
    assert [module.training for module in model.modules()] == modes
    assert forwards == [1, 2, 3, 4] * 4
    assert torch.equal(model.base_model.model.running, torch.zeros(1))
    assert torch.equal(head_weight.grad, torch.ones_like(head_weight))
    assert all(p.grad is None for n, p in model.named_parameters() if p is not head_weight)
    assert all(delta.observer is None for _, _, _, delta in iter_deltas(model))
    assert not any(delta.values.any() for _, _, _, delta in iter_deltas(model))


def test_it_trains_afterwards():
    model = make()
    select_by_gradients(model, BATCHES)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in BATCHES:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all((values != 0).all() for _, values in deltas(model).values())


def test_dropout_is_the_same_in_every_pass_and_differs_from_none():
    chosen = []
    for passes in (1, 3, 7):
        model = make(selection_passes=passes, dropout=0.3)
        torch.manual_seed(5)
        chosen.append(select_by_gradients(model, BATCHES))
    assert_same_tensors(chosen[1], chosen[0])
    assert_same_tensors(chosen[2], chosen[0])
    without = select_by_gradients(make(dropout=0.3).eval(), BATCHES)
    assert any(not torch.equal(without[name], chosen[0][name]) for name in without)


def test_only_a_part_of_the_targets_is_summed_at_a_time():
    model = make(target_modules="all", selection_passes=4)
    watched = []

    def loss(model, batch):
        watched.append([name for name, _, _, delta in iter_deltas(model) if delta.observer is not None])
        return model(**batch).loss

    select_by_gradients(model, BATCHES, loss_fn=loss)
    sizes = {name: delta.numel for name, _, _, delta in iter_deltas(model)}
    parts = watched[::4]
    assert watched == [part for part in parts for _ in range(4)]
    assert [name for part in parts for name in part] == list(sizes)
    assert len(parts) == 4
    assert max(sum(sizes[name] for name in part) for part in parts) < sum(sizes.values()) / 4 + max(sizes.values())


def test_a_loss_of_ones_own_and_the_first_batches_only(caplog):
    seen = []

    def loss(model, batch):
        seen.append(id(batch))
        return model(**batch).logits.square().sum()

    model = make(selection_batches=2, selection_passes=1)
    own = select_by_gradients(model, iter(BATCHES), loss_fn=loss)
    assert seen == [id(batch) for batch in BATCHES[:2]]
    usual = select_by_gradients(make(selection_batches=2), BATCHES)
    assert any(not torch.equal(own[name], usual[name]) for name in own)
    with caplog.at_level(logging.WARNING, logger="peft_sparse"):
        few = select_by_gradients(make(selection_batches=9), BATCHES[:2])
    assert "only 2 batches were given, selection_batches asks for 9" in caplog.text
    assert_same_tensors(few, usual)


def test_budgets_hold_in_every_group():
    model = make(budget={r"layer\.0": 0.9, r"layer\.1": 0.0, "pooler": 0.1})
    chosen = select_by_gradients(model, BATCHES)
    assert sum(len(found) for name, found in chosen.items() if "layer.0" in name) == 180
    assert sum(len(found) for name, found in chosen.items() if "layer.1" in name) == 0
    assert sum(len(found) for name, found in chosen.items() if "pooler" in name) == 20


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_named_and_nothing_happens(value):
    model = make(target_modules=["query"])

    def loss(model, batch):
        result = model(**batch).loss
        return result * (value if batch is BATCHES[2] else 1.0)

    with pytest.raises(SelectionError, match=r"gradient of bert\..*query\.weight in batch 3 of 4 holds NaN"):
        select_by_gradients(model, BATCHES, loss_fn=loss)
    assert model.peft_config["default"].counts is None
    assert all(delta.count == 0 and delta.observer is None for _, _, _, delta in iter_deltas(model))
    assert sum(map(len, select_by_gradients(model, BATCHES).values())) == 200


def test_fewer_gradients_than_weights_are_asked_for():
    model = make(num_weights=600, target_modules=["word_embeddings"])
    with pytest.raises(
        SelectionError, match=r"600 weights are asked from global, but only \d+ of 640 scored above 0\.0"
    ):
        select_by_gradients(model, BATCHES[:1])
    assert model.peft_config["default"].counts is None


def test_no_gradient_at_all():
    with pytest.raises(SelectionError, match=r"no gradient of bert.* was seen: the loss does not depend on them"):
        select_by_gradients(make(), BATCHES, loss_fn=lambda model, batch: torch.zeros(1, requires_grad=True).sum())


def test_adapters_that_gradients_do_not_choose():
    refused = [
        (RandConfig(density=0.1), "has the method 'rand', which no gradients choose the weights of"),
        (LotteryTicketConfig(density=0.1), "has the method 'lottery_ticket', which no gradients"),
        (OneShotConfig(density=0.1, criterion="largest_weight"), "has the criterion 'largest_weight', which no gradie"),
        (LoraConfig(), "a sparse adapter, .* has none, got 'default', which has a LoraConfig"),
    ]
    for config, message in refused:
        if isinstance(config, LoraConfig):
            config.target_modules = ["query"]
        with pytest.raises(ConfigError, match=message):
            select_by_gradients(get_peft_model(make_bert(), config), BATCHES)
    model = make()
    select_by_gradients(model, BATCHES)
    with pytest.raises(ConfigError, match="has its 200 weights already"):
        select_by_gradients(model, BATCHES)
    with pytest.raises(ConfigError, match=r"needs no dense phase|need no dense phase: call select_by_gradients"):
        start_dense_phase(make())


def test_models_that_are_not_ready():
    model = make()
    with pytest.raises(ConfigError, match="batches must hold at least one batch, got none"):
        select_by_gradients(model, [])
    with pytest.raises(ConfigError, match="the model gave no loss: put labels into the batches"):
        select_by_gradients(model, [{"input_ids": BATCHES[0]["input_ids"]}])
    with pytest.raises(ConfigError, match="must not be wrapped when its phase changes, got a DataParallel"):
        select_by_gradients(nn.DataParallel(model), BATCHES)
    model.add_adapter("other", RandConfig(density=0.1))
    model.set_adapter("other")
    with pytest.raises(ConfigError, match=r"adapter 'default' must be active .*: model.set_adapter\('default'\)"):
        select_by_gradients(model, BATCHES)
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter(["other"])
    with pytest.raises(ConfigError, match=r"adapters \['other'\] are merged into"):
        select_by_gradients(model, BATCHES)
    broken = make(criterion=lambda weight, gradients: gradients.mean.sum())
    with pytest.raises(ConfigError, match=r"criterion must give scores of the weight's shape .*, got the shape \(\)"):
        select_by_gradients(broken, BATCHES)


def test_an_unselected_adapter_is_saved_and_selected_after_loading(tmp_path):
    from peft import PeftModel

    model = make()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].counts is None
    loaded.eval()
    assert_same_tensors(select_by_gradients(loaded, BATCHES), select_by_gradients(make().eval(), BATCHES))


# ---- in the trainer ----------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


SETTINGS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


def test_the_trainer_selects_by_its_first_batches_and_loss(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="peft_sparse"):
        trainer = make_trainer(tmp_path, model=make(dropout=0.0), max_steps=2)
        trainer.train()
    assert "selected 200 of" in caplog.text
    assert "by criterion 'fisher' over 4 batches" in caplog.text
    # The same by hand: the trainer's data in the order that its seed gives.
    twin = make_trainer(tmp_path, model=make(dropout=0.0), max_steps=2)
    torch.manual_seed(7)
    expected = select_by_gradients(twin.model, list(twin.get_train_dataloader()))
    assert_same_tensors(indices(trainer.model), expected)
    assert trainer.state.global_step == 2
    assert all((values != 0).all() for _, values in deltas(trainer.model).values())


def test_training_goes_on_as_from_a_given_support(tmp_path):
    trainer = make_trainer(tmp_path / "a", model=make(), max_steps=3)
    trainer.train()
    model = make()
    for name, _, _, delta in iter_deltas(model):
        delta.set_support(indices(trainer.model)[name])
    model.peft_config["default"].counts = trainer.model.peft_config["default"].counts
    twin = make_trainer(tmp_path / "b", model=model, max_steps=3)
    torch.manual_seed(7)
    twin.train()
    assert_same_tensors(deltas(twin.model), deltas(trainer.model))
    assert_same_tensors(head(twin.model), head(trainer.model))


@pytest.mark.parametrize(("stop", "point"), [(1, os.path.join("_dense", "selection")), (3, "checkpoint-2")])
def test_a_stopped_run_resumes_without_selecting_again(tmp_path, stop, point, monkeypatch):
    whole = make_trainer(tmp_path / "whole", model=make(), **SETTINGS)
    whole.train()
    stopped = make_trainer(tmp_path / "part", model=make(), callbacks=[StopAt(stop)], **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert (tmp_path / "part" / point).is_dir()
    assert json.loads((tmp_path / "part" / "_dense" / "selection" / "selection.json").read_text()) == {
        "adapter": "default"
    }
    monkeypatch.setattr("peft_sparse.training.phases.one_shot.select_in_trainer", None)
    resumed = make_trainer(tmp_path / "part", model=make(), **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    assert_same_tensors(deltas(resumed.model), deltas(whole.model))
    assert_same_tensors(head(resumed.model), head(whole.model))
    assert resumed.state.global_step == 6


def test_a_dense_checkpoint_is_not_resumed_by_it(tmp_path):
    other = get_peft_model(make_bert(), LotteryTicketConfig(num_weights=200))
    make_trainer(tmp_path, model=other, dense_args={"max_steps": 2}, **SETTINGS).train()
    model = make()
    with pytest.raises(
        FormatError, match=r"checkpoint-2 is of a dense phase, which adapter 'default' \(OneShotConfig\)"
    ):
        make_trainer(tmp_path, model=model, **SETTINGS).train(str(tmp_path / "_dense" / "checkpoint-2"))
    assert model.peft_config["default"].counts is None


def test_the_trainer_refuses_to_select_in_a_sharded_model(tmp_path):
    trainer = make_trainer(tmp_path, model=make())
    trainer.is_fsdp_enabled = True
    with pytest.raises(ConfigError, match="fsdp and deepspeed shard the weights whose gradients are ranked"):
        trainer.train()


def test_weights_alone_need_no_selection_in_the_trainer(tmp_path):
    model = make(criterion="largest_weight")
    before = copy.deepcopy(indices(model))
    trainer = make_trainer(tmp_path, model=model, max_steps=2)
    assert isinstance(trainer, SparseTrainer)
    trainer.train()
    assert_same_tensors(indices(model), before)
    assert not (tmp_path / "_dense").exists()

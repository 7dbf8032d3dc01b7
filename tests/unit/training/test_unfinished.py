"""Adapters that have a first phase before them, in trainers and loops that know no phases."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer

from peft_sparse import (
    AdaSftConfig,
    ConfigError,
    DeftXConfig,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    start_dense_phase,
    start_weight_phase,
)
from tests.support.training import Labelled, make_args, make_bert, make_trainer

TICKET = LotteryTicketConfig(num_weights=100, target_modules=["query"])
UNSELECTED = [
    TICKET,
    LotteryTicketConfig(num_weights=100, target_modules=["query"], modules_to_save=["classifier"]),
    LotteryTicketConfig(num_weights=100, target_modules=["query"], inference_mode=True),
    DeftXConfig(num_weights=100, target_modules=["query"]),
    OneShotConfig(num_weights=100, target_modules=["query"], criterion="fisher"),
]


def adapted(config=TICKET):
    return get_peft_model(make_bert(dropout=0.0), config)


def plain(folder, model, **changes):
    return Trainer(model=model, args=make_args(folder, max_steps=2, **changes), train_dataset=Labelled())


def loop(model, parameters=None):
    optimizer = torch.optim.AdamW(parameters or [p for p in model.parameters() if p.requires_grad])
    for i in range(2):
        batch = {key: torch.stack([Labelled()[j][key] for j in range(i, i + 3)]) for key in Labelled()[0]}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def beside_another():
    model = adapted(RandConfig(num_weights=50, target_modules=["query"]))
    model.add_adapter("ticket", TICKET)
    model.base_model.set_adapter(["default", "ticket"])
    return model


@pytest.mark.parametrize("config", UNSELECTED)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_without_phases_is_refused_as_training_begins(tmp_path, config, checkpointing):
    model = adapted(config)
    model.enable_input_require_grads()
    trainer = plain(tmp_path, model, gradient_checkpointing=checkpointing)
    with pytest.raises(ConfigError, match=rf"\['default'\] \({type(config).__name__}\) are not selected") as raised:
        trainer.train()
    for way_out in ("SparseSFTTrainer", "sparse_trainer", "start_dense_phase", "select_by_gradients"):
        assert way_out in str(raised.value)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: m])
def test_one_unfinished_adapter_of_several_is_named(tmp_path, copied):
    model = copied(beside_another())
    with pytest.raises(ConfigError, match=r"active adapters \['ticket'\]"):
        plain(tmp_path, model).train()
    model.set_adapter("default")
    assert plain(tmp_path, model).train().global_step == 2


def test_an_adapter_that_transformers_added(tmp_path):
    model = make_bert()
    model.add_adapter(TICKET)
    with pytest.raises(ConfigError, match=r"\['default'\] \(LotteryTicketConfig\) are not selected .*SparseTrainer"):
        plain(tmp_path, model).train()
    make_trainer(tmp_path, model=model, max_steps=1).train()
    assert sum(model.peft_config["default"].counts.values()) == 100


def test_a_saved_and_reloaded_one(tmp_path, caplog):
    adapted().save_pretrained(tmp_path)
    assert "adapter 'default' is saved without weights" in caplog.text
    model = PeftModel.from_pretrained(make_bert(dropout=0.0), tmp_path, is_trainable=True)
    with pytest.raises(ConfigError, match="are not selected"):
        plain(tmp_path, model).train()
    model.enable_input_require_grads()
    with pytest.raises(ConfigError, match="nothing to train"):
        loop(model)
    make_trainer(tmp_path, model=model, max_steps=1).train()
    assert sum(model.peft_config["default"].counts.values()) == 100


def test_an_unpickled_one_in_another_process(interpreter, tmp_path):
    torch.save(adapted(), tmp_path / "model.pt")
    script = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
import transformers.trainer
print([c.__name__ for c in transformers.trainer.DEFAULT_CALLBACKS])
"""
    done = interpreter.run(script)
    assert "FirstPhaseCallback" in done.stdout


def test_what_trains_is_left_alone(tmp_path, caplog):
    for model in (make_bert(), adapted(LoraConfig(target_modules=["query"])), adapted(RandConfig(num_weights=9))):
        assert plain(tmp_path, model).train().global_step == 2
    model = adapted()
    with start_dense_phase(model) as phase:
        plain(tmp_path, model, save_strategy="steps", save_steps=1).train()  # a loop of one's own may be a trainer
        assert sum(k.numel() for k in phase.select().values()) == 100
        loop(model, list(model.parameters()))
    assert plain(tmp_path, model).train().global_step == 2
    model.save_pretrained(tmp_path / "selected")
    assert not caplog.records


def test_a_loop_that_could_train_nothing_is_refused():
    model = adapted()
    model.enable_input_require_grads()
    with pytest.raises(ConfigError, match=r"nothing to train: the weights of the adapters \['default'\]"):
        loop(model)


@pytest.mark.parametrize("make", [beside_another, lambda: copy.deepcopy(adapted(UNSELECTED[1]))])
def test_a_loop_that_trains_something_else_is_told_once(make, caplog):
    model = make()
    loop(model)
    loop(model)
    assert caplog.text.count("are not selected yet. This optimizer trains what else it holds.") == 1


def test_an_ordinary_trainer_says_that_it_does_the_first_phase_of_ada_sft(tmp_path, caplog):
    model = adapted(AdaSftConfig(target_modules=["query"]))
    plain(tmp_path, model).train()
    assert "trains the masks of the adapters ['default'], the first phase of Ada-SFT" in caplog.text
    assert "start_weight_phase(model)" in caplog.text
    caplog.clear()
    start_weight_phase(model)
    plain(tmp_path, model).train()
    make_trainer(tmp_path, model=adapted(AdaSftConfig(target_modules=["query"])), max_steps=2).train()
    assert not caplog.records

"""Which trainers get two phases, under which names, and what their constructors refuse."""

from __future__ import annotations

import pickle

import pytest
import torch
from transformers import Trainer

from peft_sparse import ConfigError, LotteryTicketConfig
from peft_sparse.training.trainer.trainer import SparseTrainer, sparse_trainer
from tests.support.training import Labelled, make_adapted, make_args, make_trainer

# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dense_args", "message"),
    [
        (
            {"learning_rat": 1.0},
            r"dense_args: 'learning_rat' is no field of TrainingArguments; did you mean 'learning_rate'\?",
        ),
        ({"bf16": True}, r"dense_args: 'bf16' is read when the trainer is made, so it holds for both phases"),
        ({"output_dir": "x"}, r"dense_args: 'output_dir' is read when the trainer is made"),
        (3, r"dense_args must be a mapping \{field: value\}, got a int"),
    ],
)
def test_dense_args_are_checked_when_the_trainer_is_made(tmp_path, dense_args, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, dense_args=dense_args)


def test_dense_epochs_replace_steps_and_decay_is_warned_of(tmp_path, caplog):
    trainer = make_trainer(tmp_path, max_steps=2, dense_args={"num_train_epochs": 2, "weight_decay": 0.1})
    assert "dense_args: weight_decay=0.1 moves every weight" in caplog.text
    trainer.train()
    assert trainer.dense_state.global_step == 12  # 24 examples in batches of 4, twice
    assert trainer.state.global_step == 2


def test_one_optimizer_cannot_serve_two_phases(tmp_path):
    model = make_adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trainer = make_trainer(tmp_path, model=model, optimizers=(optimizer, None))
    with pytest.raises(ConfigError, match=r"optimizers= gives one optimizer, .* optimizer_cls_and_kwargs"):
        trainer.train()
    trainer = SparseTrainer(
        model=make_adapted(),
        args=make_args(tmp_path, max_steps=2),
        train_dataset=Labelled(),
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5}),
    )
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.SGD


def test_two_unselected_tickets_at_once(tmp_path):
    model = make_adapted(modules_to_save=None)
    model.add_adapter("other", LotteryTicketConfig(density=0.1))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match=r"one adapter at a time .* \['default', 'other'\]"):
        make_trainer(tmp_path, model=model).train()


# ---- classes ---------------------------------------------------------------------------------------------------------


class MyTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls = getattr(self, "calls", 0) + 1
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def test_any_trainer_class_gets_two_phases(tmp_path):
    made = sparse_trainer(MyTrainer)
    assert made.__name__ == "SparseMyTrainer"
    assert sparse_trainer(MyTrainer) is made
    assert sparse_trainer(made) is made
    assert sparse_trainer(Trainer) is SparseTrainer
    trainer = made(
        model=make_adapted(),
        args=make_args(tmp_path, max_steps=3),
        train_dataset=Labelled(),
        dense_args={"max_steps": 2},
    )
    trainer.train()
    assert trainer.calls == 5
    with pytest.raises(ConfigError, match=r"must be a class derived from transformers.Trainer, got <class 'int'>"):
        sparse_trainer(int)


def test_classes_are_found_by_name():
    assert pickle.loads(pickle.dumps(SparseTrainer)) is SparseTrainer


def test_unknown_names_in_the_module():
    import peft_sparse.training.trainer.trainer as module

    with pytest.raises(AttributeError, match="has no attribute 'SparseDPOTrainer'"):
        _ = module.SparseDPOTrainer

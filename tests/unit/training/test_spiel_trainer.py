"""SpIEL in sparse trainers and in TRL: the optimizer, the log, and checkpoints that were moved."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer

from peft_sparse import SM3, ConfigError, SparseAdamW, SparseTrainer, SpielAGConfig, SpielMAConfig, iter_reselectors
from tests.support.training import Labelled, assert_same_tensors, deltas, make_args, make_bert

FIELDS = {"density": 0.05, "reselection_steps": 4, "estimation_steps": 2}


def trainer(folder, cls=SpielAGConfig, kind=SparseTrainer, **changes):
    model = get_peft_model(make_bert(dropout=0.0), cls(**FIELDS, modules_to_save=["classifier"]))
    args = make_args(folder, **{"max_steps": 10, **changes})
    return kind(model=model, args=args, train_dataset=Labelled())


@pytest.mark.parametrize(
    ("cls", "changes", "expected"),
    [
        (SpielAGConfig, {}, SparseAdamW),
        (SpielMAConfig, {}, SM3),
        (SpielAGConfig, {"optim": "sgd"}, torch.optim.SGD),
        (SpielMAConfig, {"optim": "adafactor"}, None),
    ],
)
def test_the_optimizer_is_the_methods_own_unless_the_user_chose_one(tmp_path, cls, changes, expected):
    run = trainer(tmp_path, cls, **changes)
    run.train()
    optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    assert type(optimizer) is expected if expected else type(optimizer).__name__ == "Adafactor"
    (reselector,) = iter_reselectors(run.model)
    assert [r.update for r in reselector.history] == [2, 6]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in run.model.parameters() if p.requires_grad} == held


def test_a_plain_trainer_keeps_its_optimizer(tmp_path):
    run = trainer(tmp_path, kind=Trainer)
    run.train()
    assert type(getattr(run.optimizer, "optimizer", run.optimizer)) is torch.optim.AdamW


@pytest.mark.parametrize("trainer_class", [Trainer, SparseTrainer])
def test_an_adapter_that_is_merged_is_not_left_out_of_a_run_in_silence(tmp_path, trainer_class):
    model = get_peft_model(make_bert(), SpielAGConfig(density=0.05, modules_to_save=["classifier"]))
    model.merge_adapter()
    trainer = trainer_class(model=model, args=make_args(tmp_path, max_steps=2), train_dataset=Labelled())
    with pytest.raises(ConfigError, match=r"\['default'\] are merged.*unmerge_adapter\(\) first"):
        trainer.train()
    model.unmerge_adapter()
    trainer.train()
    assert trainer.state.global_step == 2


def test_reselections_are_logged_once(tmp_path):
    run = trainer(tmp_path)
    run.train()
    shown = {entry["step"]: entry for entry in run.state.log_history if "share_replaced" in entry}
    assert set(shown) == {2, 6}
    assert shown[2]["share_replaced"] > 0.5 > shown[6]["share_replaced"] > 0
    assert shown[6]["mean_age"] > shown[2]["mean_age"]
    assert shown[6]["mean_abs_delta"] > 0


@pytest.mark.parametrize("cls", [SpielAGConfig, SpielMAConfig])
def test_a_moved_checkpoint_resumes_bit_for_bit(tmp_path, cls, caplog):
    whole = trainer(tmp_path / "a", cls, save_strategy="steps", save_steps=5)
    whole.train()
    shutil.move(tmp_path / "a" / "checkpoint-5", tmp_path / "elsewhere")
    again = trainer(tmp_path / "b", cls)
    with caplog.at_level("WARNING", logger="peft_sparse"):
        again.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    assert "was not found" not in caplog.text
    assert_same_tensors(deltas(again.model), deltas(whole.model))

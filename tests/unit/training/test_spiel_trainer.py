"""SpIEL in sparse trainers and in TRL: the optimizer, the log, and checkpoints that were moved."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer

from peft_sparse import SM3, ConfigError, SparseAdamW, SparseTrainer, SpielAGConfig, SpielMAConfig, iter_reselectors
from peft_sparse.training.spiel.callback import STATE_FILE
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


@pytest.mark.parametrize("cls", [SpielAGConfig, SpielMAConfig])
def test_another_runs_state_of_as_many_steps_is_refused_by_name(tmp_path, cls, caplog):
    """transformers tells callbacks how many steps a checkpoint has made, and not where it lies."""
    saved = {"kind": Trainer, "save_strategy": "steps", "save_steps": 5}
    whole = trainer(tmp_path / "out", cls, **saved)
    whole.train()
    shutil.copytree(tmp_path / "out", tmp_path / "kept")
    trainer(tmp_path / "out", cls, **saved, data_seed=1).train()
    alone = trainer(tmp_path / "alone", cls, kind=Trainer)
    alone.train(resume_from_checkpoint=str(tmp_path / "kept" / "checkpoint-5"))
    assert f"{STATE_FILE} was not found in {tmp_path / 'alone' / 'checkpoint-5'}: reselection goes on" in caplog.text
    caplog.clear()
    again = trainer(tmp_path / "out", cls, kind=Trainer)
    again.train(resume_from_checkpoint=str(tmp_path / "kept" / "checkpoint-5"))
    told = f"{STATE_FILE} belongs to other weights than those that were resumed, in {tmp_path / 'out' / 'checkpoint-5'}"
    assert f"{told}: reselection goes on from update 5" in caplog.text
    assert_same_tensors(deltas(again.model), deltas(alone.model))
    (found,), (expected,) = iter_reselectors(again.model), iter_reselectors(alone.model)
    assert_same_tensors(found.state_dict(), expected.state_dict())
    # The folder that the trainer was told of is the one of its own run.
    own = trainer(tmp_path / "kept", cls, kind=Trainer)
    own.train(resume_from_checkpoint=str(tmp_path / "kept" / "checkpoint-5"))
    assert_same_tensors(deltas(own.model), deltas(whole.model))


# ---- a run that another trainer began --------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW])
def test_what_a_plain_trainer_began_goes_on_in_a_sparse_one(tmp_path, optimizer, caplog):
    whole = trainer(tmp_path, kind=Trainer, save_strategy="steps", save_steps=5)
    whole.train()
    again = trainer(tmp_path)
    if optimizer is not None:
        again.optimizer_cls_and_kwargs = (optimizer, {"lr": 1e-2, "fused": True})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    (reselector,) = iter_reselectors(again.model)
    assert (reselector.update, [r.update for r in reselector.history]) == (10, [6])
    if optimizer is not None:
        assert_same_tensors(deltas(again.model), deltas(whole.model))
        return
    assert "SparseAdamW goes on from a state of AdamW" in caplog.text
    # The head, which does not reselect, has made all of its steps, and in the first of them the same as before.
    own, theirs = (getattr(run.optimizer, "optimizer", run.optimizer) for run in (again, whole))
    heads = [next(p for n, p in run.model.named_parameters() if "modules_to_save" in n) for run in (again, whole)]
    assert int(own.state[heads[0]]["age"]) == int(theirs.state[heads[1]]["step"]) == 10
    losses = [{e["step"]: e["loss"] for e in run.state.log_history if "loss" in e} for run in (again, whole)]
    assert [losses[0][step] for step in (6, 7)] == [losses[1][step] for step in (6, 7)]


@pytest.mark.parametrize(
    ("cls", "began", "optimizer", "message"),
    [
        (SpielMAConfig, Trainer, None, "was written by AdamW, and this run's is SM3"),
        (SpielMAConfig, SparseTrainer, torch.optim.AdamW, "was written by SM3, and this run's is AdamW"),
        (SpielAGConfig, SparseTrainer, torch.optim.AdamW, "was written by SparseAdamW, and this run's is AdamW"),
        (SpielAGConfig, SparseTrainer, SM3, "was written by SparseAdamW, and this run's is SM3"),
    ],
)
def test_the_state_of_another_optimizer_is_refused_by_name(tmp_path, cls, began, optimizer, message):
    trainer(tmp_path, cls, kind=began, max_steps=5, save_strategy="steps", save_steps=5).train()
    again = trainer(tmp_path, cls)
    if optimizer is not None:
        again.optimizer_cls_and_kwargs = (optimizer, {"lr": 1e-2})
    with pytest.raises(ConfigError, match=rf"^the state of the optimizer {message}.*optimizer_cls_and_kwargs="):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    # The way out that the error names.
    (tmp_path / "checkpoint-5" / "optimizer.pt").unlink()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again.state.global_step == 10

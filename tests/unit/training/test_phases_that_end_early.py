"""SIGTERM, early stopping and Ctrl-C in the first phase, at the boundary and in the second."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, trainer_jit_checkpoint

from peft_sparse import AdaSftConfig, LotteryTicketConfig, OneShotConfig, SparseTrainer, iter_deltas
from peft_sparse.training.phases import one_shot
from peft_sparse.training.phases.dense_phase import DensePhase
from peft_sparse.training.spiel.callback import STATE_FILE
from peft_sparse.training.trainer.resume import find_resume_point
from tests.support.training import (
    Labelled,
    assert_same_tensors,
    base_weights,
    deltas,
    make_adapted,
    make_args,
    make_bert,
    make_trainer,
    state_of,
)

CONFIGS = {
    "dense": LotteryTicketConfig(num_weights=100, target_modules=["query"], modules_to_save=["classifier"]),
    "mask": AdaSftConfig(target_modules=["query"], modules_to_save=["classifier"]),
}
SECOND = {"dense": "sparse", "mask": "weights"}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """transformers waits three seconds for a SIGKILL before it believes a SIGTERM."""

    class Timer:
        def __init__(self, seconds, call):
            self.start = call

    monkeypatch.setattr(trainer_jit_checkpoint.threading, "Timer", Timer)


class At(TrainerCallback):
    """Does something at an event of a phase."""

    def __init__(self, phase, step, do, event="on_step_begin"):
        self.phase, self.step, self.do = phase, step, do
        setattr(self, event, self.act)

    def act(self, args, state, control, **kwargs):
        if self.trainer._phase_name == self.phase and state.global_step == self.step:
            self.do(control)


def terminate(control=None):
    os.kill(os.getpid(), signal.SIGTERM)


def make(folder, kind, callback=None, **changes):
    model = get_peft_model(make_bert(dropout=0.0), CONFIGS[kind])
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 100, "enable_jit_checkpoint": True, **changes}
    trainer = make_trainer(folder, model=model, callbacks=[callback] if callback else None, **settings)
    if callback is not None:
        callback.trainer = trainer
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    runs = {kind: make(tmp_path_factory.mktemp(kind), kind) for kind in CONFIGS}
    for trainer in runs.values():
        trainer.train()
    return runs


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end"])
def test_sigterm_in_the_first_phase_stops_the_run_and_it_resumes(tmp_path, kind, event, whole, caplog):
    handler = signal.getsignal(signal.SIGTERM)
    trainer = make(tmp_path, kind, At(kind, 3, terminate, event))
    before = base_weights(trainer.model)
    output = trainer.train()
    first = getattr(trainer, f"{kind}_state").global_step
    assert (trainer.state.global_step, output.global_step) == (0, first)
    assert 3 <= first < 6
    assert f"the {kind} phase ended after {first} of 6 steps: SIGTERM" in caplog.text
    assert_same_tensors(
        {n: p for n, p in base_weights(trainer.model).items() if "modules" not in n and "ada_sft" not in n},
        {n: p for n, p in before.items() if "modules" not in n and "ada_sft" not in n},
    )
    assert signal.getsignal(signal.SIGTERM) == handler
    point = find_resume_point(str(tmp_path), True, kind)
    assert (point.phase, os.path.basename(point.path)[:11]) == (kind, "checkpoint-")
    resumed = make(tmp_path, kind)
    resumed.train(resume_from_checkpoint=True)
    assert_same_tensors(state_of(resumed.model), state_of(whole[kind].model))


@pytest.mark.parametrize("kind", CONFIGS)
def test_sigterm_in_the_second_phase_stops_there(tmp_path, kind, whole, caplog):
    trainer = make(tmp_path, kind, At(SECOND[kind], 2, terminate))
    trainer.train()
    assert trainer.state.global_step == 3
    assert f"the {SECOND[kind]} phase ended after 3 of 6 steps: SIGTERM" in caplog.text
    assert find_resume_point(str(tmp_path), True, kind).path == str(tmp_path / "checkpoint-2")
    resumed = make(tmp_path, kind)
    resumed.train(resume_from_checkpoint=True)
    assert_same_tensors(state_of(resumed.model), state_of(whole[kind].model))


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_sigterm_while_weights_are_selected_keeps_the_selection(tmp_path, save_strategy, whole, monkeypatch):
    select = DensePhase.select
    trainer = make(tmp_path, "dense", save_strategy=save_strategy)
    with monkeypatch.context() as patch:
        patch.setattr(DensePhase, "select", lambda phase: (terminate(), select(phase))[1])
        trainer.train()
    assert trainer.state.global_step == 0
    assert find_resume_point(str(tmp_path), True).phase == "selection"
    resumed = make(tmp_path, "dense")
    resumed.train(resume_from_checkpoint=True)
    assert_same_tensors(state_of(resumed.model), state_of(whole["dense"].model))


def test_sigterm_while_gradients_select(tmp_path, monkeypatch):
    def trainer():
        model = get_peft_model(
            make_bert(dropout=0.0), OneShotConfig(num_weights=100, target_modules=["query"], criterion="fisher")
        )
        return make_trainer(tmp_path, model=model, max_steps=3, enable_jit_checkpoint=True)

    select = one_shot.select_in_trainer
    with monkeypatch.context() as patch:
        patch.setattr(one_shot, "select_in_trainer", lambda *args: (terminate(), select(*args)))
        stopped = trainer()
        assert stopped.train().global_step == 0
    support = {name: indices for name, (indices, _) in deltas(stopped.model).items()}
    assert sum(map(len, support.values())) == 100
    resumed = trainer()
    assert resumed.train(resume_from_checkpoint=True).global_step == 3
    assert all(torch.equal(indices, support[name]) for name, (indices, _) in deltas(resumed.model).items())


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_callback_that_stops_the_first_phase_goes_on_and_the_log_counts_its_steps(tmp_path, kind, caplog):
    def stop(control):
        control.should_training_stop = True

    trainer = make(tmp_path, kind, At(kind, 2, stop, "on_step_end"), enable_jit_checkpoint=False)
    trainer.train()
    assert getattr(trainer, f"{kind}_state").global_step == 2
    assert trainer.state.global_step == 6
    assert f"the {kind} phase ended after 2 of 6 steps, for a callback or the data stopped it" in caplog.text
    assert caplog.text.count(" steps") == 1


def test_an_interrupt_in_the_dense_phase_leaves_the_model_as_it_was(tmp_path):
    def interrupt(control):
        raise KeyboardInterrupt

    callback = At("dense", 3, interrupt, "on_step_end")
    model = make_adapted(target_modules=["query"])
    trainer = make_trainer(tmp_path, model=model, callbacks=[callback])
    callback.trainer = trainer
    before, args = state_of(model), trainer.args
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same_tensors(state_of(model), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    assert trainer.args is args
    callback.step = None
    trainer.train()
    assert sum(d.count for _, _, _, d in iter_deltas(model)) == 200


@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end"])
@pytest.mark.parametrize("cls", [SparseTrainer, Trainer])
def test_sigterm_before_a_spiel_checkpoint_keeps_its_window(tmp_path, cls, event):
    """A just-in-time checkpoint calls no callback; the state of the reselection is in it all the same."""
    from peft_sparse import SpielAGConfig

    def trainer(callback=None):
        config = SpielAGConfig(density=0.05, target_modules=["query"], reselection_steps=4, estimation_steps=3)
        args = make_args(tmp_path, max_steps=10, enable_jit_checkpoint=True)
        model = get_peft_model(make_bert(dropout=0.0), config)
        return cls(model=model, args=args, train_dataset=Labelled(), callbacks=[callback] if callback else [])

    uninterrupted = trainer()
    uninterrupted.train()
    callback = At(None, 6, terminate, event)
    stopped = trainer(callback)
    stopped._phase_name = None
    callback.trainer = stopped
    stopped.train()
    assert stopped.state.global_step == (7 if event == "on_step_begin" else 6)
    assert (tmp_path / "checkpoint-6" / STATE_FILE).is_file()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 10
    assert_same_tensors(deltas(resumed.model), deltas(uninterrupted.model))

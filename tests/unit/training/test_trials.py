"""Hyperparameter search: each trial has a model of its own, and two phases where its adapter has them."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import BestRun, HPSearchBackend

from peft_sparse import AdaSftConfig, LotteryTicketConfig, OneShotConfig, SpielAGConfig, select_by_gradients
from peft_sparse.training.trainer.trainer import SparseTrainer
from tests.support.training import Labelled, assert_same_tensors, deltas, make_args, make_bert, make_trainer

TRIALS = [
    {"learning_rate": 1e-2, "per_device_train_batch_size": 8},
    {"learning_rate": 1e-3, "per_device_train_batch_size": 2},
    {"learning_rate": 2e-2, "per_device_train_batch_size": 4},
]
FISHER = {"num_weights": 200, "criterion": "fisher", "selection_batches": 2}
CONFIGS = {
    "LT-SFT": lambda: LotteryTicketConfig(num_weights=200),
    "Ada-SFT": AdaSftConfig,
    "one-shot": lambda: OneShotConfig(**FISHER),
    "SpIEL": lambda: SpielAGConfig(num_weights=200, reselection_steps=2, estimation_steps=1),
}
FIRST = {"learning_rate": 5e-3, "per_device_train_batch_size": 6, "max_steps": 3}


class Trial:
    """What optuna gives for a trial."""

    def __init__(self, number, params):
        self.number, self.params = number, params


class Backend:
    """Goes through `TRIALS` in order, as optuna's does through what it suggests."""

    default_hp_space = staticmethod(lambda trial: dict(trial.params))

    def ensure_available(self):
        pass

    def run(self, trainer, n_trials, direction):
        objectives = []
        for number, params in enumerate(TRIALS[:n_trials]):
            trainer.objective = None
            trainer.train(trial=Trial(number, params))
            if trainer.objective is None:
                trainer.objective = trainer.compute_objective(trainer.evaluate())
            objectives.append(trainer.objective)
            # As optuna's: models are not kept from one trial to the next.
            trainer.model_wrapped = trainer.model = None
            trainer.accelerator.clear()
        best = min(range(n_trials), key=objectives.__getitem__)
        return BestRun(str(best), objectives[best], {**TRIALS[best], "all": objectives})


class Spy(TrainerCallback):
    def __init__(self):
        self.seen, self.trainer = [], None

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        if state.global_step == 0:
            rate = optimizer.param_groups[0]["initial_lr"]
            self.seen.append((self.trainer._phase_name, rate, self.trainer._train_batch_size, state.max_steps))


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Backend)
    # transformers imports it to ask of what kind a trial is.
    optuna = ModuleType("optuna")
    optuna.__spec__ = ModuleSpec("optuna", None)
    optuna.trial = ModuleType("optuna.trial")
    optuna.trial.BaseTrial = Trial
    monkeypatch.setitem(sys.modules, "optuna", optuna)


def searching(folder, name, **changes):
    spy, made = Spy(), []

    def model_init():
        made.append(get_peft_model(make_bert(dropout=0.0), CONFIGS[name]()))
        return made[-1]

    first = {"LT-SFT": {"dense_args": FIRST}, "Ada-SFT": {"mask_args": FIRST}}.get(name, {})
    trainer = SparseTrainer(
        model_init=model_init,
        args=make_args(folder, max_steps=4, **changes),
        train_dataset=Labelled(),
        eval_dataset=Labelled(8, seed=2),
        callbacks=[spy],
        **first,
    )
    spy.trainer = trainer
    return trainer, spy, made


@pytest.mark.parametrize("name", CONFIGS)
def test_each_trial_trains_a_new_model_with_its_own_arguments(tmp_path, name):
    trainer, spy, made = searching(tmp_path, name)
    best = trainer.hyperparameter_search(n_trials=3, backend="optuna")
    assert len(made) == 4  # the trainer itself makes the first one
    second = {"Ada-SFT": "weights", "SpIEL": None}.get(name, "sparse")
    wanted = []
    for trial in TRIALS:
        if name in ("LT-SFT", "Ada-SFT"):
            # What is said of a first phase alone is no trial's to change.
            wanted.append(("dense" if name == "LT-SFT" else "mask", 5e-3, 6, 3))
        wanted.append((second, trial["learning_rate"], trial["per_device_train_batch_size"], 4))
    assert spy.seen == wanted
    assert len(set(best.hyperparameters["all"])) == 3
    if name != "Ada-SFT":
        supports = [deltas(model) for model in made[1:]]
        assert all(sum(len(values) for _, values in each.values()) == 200 for each in supports)
        assert all(values.all() for each in supports for _, values in each.values())


def test_a_selection_sees_the_batches_of_its_own_trial(tmp_path):
    trainer, _, made = searching(tmp_path, "one-shot")
    trainer.hyperparameter_search(n_trials=2, backend="optuna")
    for trial, model in zip(TRIALS, made[1:], strict=False):
        twin = make_trainer(
            tmp_path / "twin",
            model=get_peft_model(make_bert(dropout=0.0), CONFIGS["one-shot"]()),
            per_device_train_batch_size=trial["per_device_train_batch_size"],
        )
        torch.manual_seed(7)
        batches = [batch for batch, _ in zip(twin.get_train_dataloader(), range(2), strict=False)]
        expected = select_by_gradients(twin.model, batches)
        assert_same_tensors({name: indices for name, (indices, _) in deltas(model).items()}, expected)


def test_a_trial_is_judged_by_its_second_phase(tmp_path):
    """The first phase evaluates and the second does not, so its loss comes from an evaluation afterwards."""
    trainer, _, made = searching(tmp_path, "LT-SFT")
    trainer.dense_args = {**FIRST, "eval_strategy": "steps", "eval_steps": 1}
    reported = []
    trainer._report_to_hp_search = _spied(trainer, trainer._report_to_hp_search, reported)
    best = trainer.hyperparameter_search(n_trials=1, backend="optuna")
    assert reported == ["dense"] * 3
    twin = make_trainer(tmp_path / "twin", model=made[1])
    assert best.objective == pytest.approx(twin.evaluate()["eval_loss"], rel=1e-6)


def _spied(trainer, report, reported):
    def spy(trial, step, metrics):
        reported.append(trainer._phase_name)
        report(trial, step, metrics)

    return spy

"""sparse_trainer over trainers with signatures of their own, and losses that want a training loop around them."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer

from peft_sparse import (
    AdaSftConfig,
    ConfigError,
    LotteryTicketConfig,
    OneShotConfig,
    SelectionError,
    SparseTrainer,
    SpielAGConfig,
    sparse_trainer,
)
from peft_sparse.training.phases.one_shot import select_in_trainer
from tests.support.training import Labelled, assert_same_tensors, deltas, make_args, make_bert

CONFIGS = {
    "ticket": LotteryTicketConfig(num_weights=50, target_modules=["query"]),
    "fisher": OneShotConfig(num_weights=50, target_modules=["query"], criterion="fisher"),
    "spiel": SpielAGConfig(num_weights=50, target_modules=["query"], reselection_steps=3, estimation_steps=2),
    "ada": AdaSftConfig(target_modules=["query"]),
}


class Keywords(Trainer):
    def train(self, resume_from_checkpoint=None, **more):
        assert not more
        return super().train(resume_from_checkpoint, **more)

    def create_optimizer(self):
        return super().create_optimizer()

    def log(self, logs, *more):
        return super().log(logs, *more)

    def _save(self, output_dir=None):
        return super()._save(output_dir)

    def _load_from_checkpoint(self, folder):
        return super()._load_from_checkpoint(folder)


class Old(Trainer):
    def train(self, *args, **kwargs):
        return super().train(*args, **kwargs)

    def log(self, logs, start_time=None):
        return super().log(logs, start_time)

    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=4, collate_fn=self.data_collator)

    def compute_loss(self, model, inputs, return_outputs=False, **more):
        labels = inputs.pop("labels")
        return torch.nn.functional.cross_entropy(model(**inputs).logits, labels)


class Mine(SparseTrainer):
    def train(self, resume_from_checkpoint=None):
        return super().train(resume_from_checkpoint)

    def create_optimizer(self):
        return super().create_optimizer()


def make(folder, cls, kind, **changes):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **changes}
    model = get_peft_model(make_bert(dropout=0.0), CONFIGS[kind])
    return sparse_trainer(cls)(model=model, args=make_args(folder, **changes), train_dataset=Labelled())


@pytest.fixture(scope="module", params=CONFIGS)
def plain(request, tmp_path_factory):
    """A kind of adapter, and the state of its model after a run of a trainer without overrides."""
    trainer = make(tmp_path_factory.mktemp("plain"), Trainer, request.param)
    trainer.train()
    return request.param, dict(trainer.model.state_dict())


@pytest.mark.parametrize("cls", [Keywords, Old, Mine])
def test_overrides_are_asked_for_what_was_given_alone(tmp_path, cls, plain):
    kind, expected = plain
    own = make(tmp_path / "own", cls, kind)
    own.train()
    assert own.state.global_step == 4
    if cls is not Old:  # whose batches are not shuffled
        assert_same_tensors(dict(own.model.state_dict()), expected)
    shutil.rmtree(tmp_path / "own" / "checkpoint-4")
    resumed = make(tmp_path / "own", cls, kind)
    resumed.train(resume_from_checkpoint=True)
    assert_same_tensors(dict(resumed.model.state_dict()), dict(own.model.state_dict()))


def test_a_loss_that_counts_its_items(tmp_path):
    class Counting(Trainer):
        def compute_loss(self, model, inputs, num_items_in_batch):
            counts.append(num_items_in_batch)
            return model(**inputs).loss

    counts: list[object] = []
    trainer = make(tmp_path, Counting, "fisher", max_steps=1)
    select_in_trainer(trainer, "default")
    assert sum(len(indices) for indices, _ in deltas(trainer.model).values()) == 50
    # Six batches of four labels each, in two passes.
    assert [float(count) for count in counts] == [4.0] * 12


@pytest.mark.parametrize(
    "error", [AttributeError("_step"), KeyError("completion"), TypeError("None"), ValueError("no input_ids")]
)
def test_a_loss_that_cannot_be_computed_outside_of_the_loop(tmp_path, error):
    class Stateful(Trainer):
        def compute_loss(self, *args, **kwargs):
            raise error

    with pytest.raises(ConfigError, match=rf"SparseStateful.*outside of its training loop \({type(error).__name__}.*"):
        make(tmp_path, Stateful, "fisher").train()
    error = SelectionError("what this library itself says stays as it is")
    with pytest.raises(SelectionError, match="what this library itself says stays as it is"):
        make(tmp_path, Stateful, "fisher").train()


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL")
@pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer"])
def test_trainers_that_make_their_batches_are_refused_by_name(name):
    import trl

    trainer = object.__new__(sparse_trainer(getattr(trl, name)))
    with pytest.raises(ConfigError, match=rf"Sparse{name} makes its batches while it trains.*select_by_gradients"):
        select_in_trainer(trainer, "default")

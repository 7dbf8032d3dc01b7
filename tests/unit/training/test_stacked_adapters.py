"""A frozen adapter with a trained one above it: in resumed runs, and in those that end with their best model."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from transformers import Trainer

from peft_sparse import BottleneckConfig, ConfigError, RandConfig, sparse_trainer
from peft_sparse.training.stacked_adapters import StackedAdaptersCallback
from tests.support.training import Labelled, assert_same_tensors, make_args, make_bert

TYPES = {
    "sparse": lambda **own: RandConfig(density=0.1, **own),
    "bottleneck": lambda **own: BottleneckConfig(bottleneck_size=4, **own),
}
SAVED = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
BEST = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}


def stacked(kind, names=("language", "task")):
    model = get_peft_model(make_bert(), TYPES[kind](init_weights=False), adapter_name=names[0])
    model.add_adapter(names[1], TYPES[kind]())
    model.base_model.set_adapter(list(names))
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if f".{names[1]}" in name:
            parameter.requires_grad_(True)
    return model


def trainer(folder, model, trainer_class, **changes):
    args = make_args(folder, **SAVED, **changes)
    return trainer_class(model=model, args=args, train_dataset=Labelled(), eval_dataset=Labelled(8, seed=2))


def own(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".language" in name or ".task" in name}


@pytest.mark.parametrize("kind", TYPES)
def test_a_sparse_trainer_brings_back_the_one_that_trains(tmp_path, kind):
    model = stacked(kind)
    trainer(tmp_path, model, sparse_trainer(Trainer)).train()
    resumed = stacked(kind)
    before = own(resumed)
    trainer(tmp_path, resumed, sparse_trainer(Trainer)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.active_adapters == ["language", "task"]
    assert_same_tensors(own(resumed), own(model))
    assert {name for name, p in own(resumed).items() if not p.equal(before[name])} <= {
        n for n in before if ".task" in n
    }


@pytest.mark.parametrize("kind", TYPES)
def test_another_trainer_refuses_to_resume_with_the_first_alone(tmp_path, kind):
    trainer(tmp_path, stacked(kind), Trainer).train()
    with pytest.raises(ConfigError, match=r"\['language', 'task'\] were active, .*'language' alone\. .*sparse_trainer"):
        trainer(tmp_path, stacked(kind), Trainer).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("kind", TYPES)
def test_the_best_of_a_stack(tmp_path, kind):
    with pytest.raises(ConfigError, match=r"load_best_model_at_end=True: .*'language' alone, and \['task'\] train"):
        trainer(tmp_path, stacked(kind), Trainer, **BEST).train()
    # At this rate the last model is not the best one.
    best = trainer(tmp_path, stacked(kind), sparse_trainer(Trainer), learning_rate=1.0, **BEST)
    best.train()
    assert best.evaluate()["eval_loss"] == pytest.approx(best.state.best_metric, abs=1e-6)


def test_one_active_adapter_is_no_stack(tmp_path):
    model = stacked("sparse")
    model.set_adapter("task")
    plain = trainer(tmp_path, model, Trainer)
    assert any(isinstance(one, StackedAdaptersCallback) for one in plain.callback_handler.callbacks)
    plain.train()
    resumed = stacked("sparse")
    resumed.set_adapter("task")
    trainer(tmp_path, resumed, Trainer).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_tensors(own(resumed), own(model))


@pytest.mark.parametrize("kind", TYPES)
def test_a_stack_that_the_first_batch_makes_is_one(tmp_path, kind):
    """As under `LanguageSwitch`."""
    model = stacked(kind)
    model.set_adapter("task")

    def stack(*_):
        model.base_model.set_adapter(["language", "task"])
        model.base_model.set_requires_grad("language", requires_grad=False)

    model.register_forward_pre_hook(stack)
    with pytest.raises(ConfigError, match=r"load_best_model_at_end=True: .*'language' alone, and \['task'\] train"):
        trainer(tmp_path, model, Trainer, **BEST).train()
    trainer(tmp_path, model, Trainer).train()

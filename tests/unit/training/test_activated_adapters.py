"""An adapter that was loaded to be used and is let train afterwards trains like one that was loaded to be trained."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer

from peft_sparse import OneShotConfig, RandConfig, SparseTrainer, SpielAGConfig, SpielMAConfig, iter_deltas, rate_scales
from peft_sparse.training.spiel.callback import STATE_FILE
from peft_sparse.training.spiel.in_trainer import optimizer_for
from peft_sparse.training.spiel.reselector import iter_reselectors
from tests.support.reselection import QUICK, optimizer_of, train
from tests.support.training import Labelled, assert_same_tensors, deltas, make_args, make_bert

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIGS = {
    "SpIEL-AG": lambda: SpielAGConfig(**QUICK),
    "SpIEL-MA": lambda: SpielMAConfig(**QUICK, fitted_rate=True),
    "fitted rate": lambda: RandConfig(density=0.05, fitted_rate=True),
    "two rates": lambda: OneShotConfig(density=0.05, random_share=0.5),
}


def bert():
    return make_bert(dropout=0.0, layers=1)


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory):
    """The folder of an adapter that has some training behind it."""
    model = get_peft_model(bert(), CONFIGS[request.param]())
    if request.param == "two rates":
        SparseTrainer(model, make_args(tmp_path_factory.mktemp("run"), max_steps=2), train_dataset=Labelled()).train()
    else:
        train(model, optimizer_of(model), range(3))
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


def trainable(folder):
    return PeftModel.from_pretrained(bert(), folder, is_trainable=True)


def activated(folder):
    model = PeftModel.from_pretrained(bert(), folder)
    model.set_adapter("default")
    return model


def beside_another(folder):
    model = PeftModel.from_pretrained(bert(), folder, adapter_name="first")
    model.load_adapter(folder, "default")
    model.set_adapter("default")
    model.delete_adapter("first")
    return model


def unfrozen(folder):
    model = PeftModel.from_pretrained(bert(), folder)
    model.set_requires_grad("default")
    return model


def by_hand(folder):
    model = PeftModel.from_pretrained(bert(), folder)
    for *_, delta in iter_deltas(model):
        delta.values.requires_grad_(True)
    return model


def enabled(folder):
    model = PeftModel.from_pretrained(bert(), folder)
    with model.disable_adapter():
        pass
    return model


def copied(folder):
    model = copy.deepcopy(PeftModel.from_pretrained(bert(), folder))
    model.set_adapter("default")
    return model


def natively(folder):
    model = bert()
    model.load_adapter(str(folder))
    model.set_adapter("default")
    return model


WAYS = [activated, beside_another, unfrozen, by_hand, enabled, copied, natively]


@pytest.mark.parametrize("way", WAYS)
def test_a_loop_trains_it_alike(saved, way):
    expected, model = trainable(saved), way(saved)
    start = deltas(model)
    for each in (expected, model):
        train(each.train(), optimizer_of(each), range(3, 12))
    assert_same_tensors(deltas(model), deltas(expected))
    assert rate_scales(model) == rate_scales(expected)
    assert len(list(iter_reselectors(model))) == len(list(iter_reselectors(expected)))
    if list(iter_reselectors(expected)):
        (reselector,) = iter_reselectors(model)
        assert [r.update for r in reselector.history] == [2, 6]
        assert any(not torch.equal(start[name][0], now[0]) for name, now in deltas(model).items())


@pytest.mark.parametrize("kind", [Trainer, SparseTrainer])
@pytest.mark.parametrize("way", [activated, natively])
def test_a_trainer_trains_it_alike(saved, tmp_path, kind, way):
    def trained(model, folder, **changes):
        trainer = kind(model, make_args(folder, max_steps=8, save_steps=4, **changes), train_dataset=Labelled())
        trainer.train()
        return trainer

    expected = trained(trainable(saved), tmp_path / "expected", save_strategy="steps")
    found = trained(way(saved), tmp_path / "found", save_strategy="steps")
    assert_same_tensors(deltas(found.model), deltas(expected.model))
    kept = [(folder / "checkpoint-4" / STATE_FILE).is_file() for folder in (tmp_path / "found", tmp_path / "expected")]
    assert kept[0] == kept[1]
    if way is natively and kind is Trainer:
        return  # transformers cannot resume such a model
    resumed = kind(way(saved), make_args(tmp_path / "found", max_steps=8), train_dataset=Labelled())
    resumed.train(resume_from_checkpoint=str(tmp_path / "found" / "checkpoint-4"))
    assert_same_tensors(deltas(resumed.model), deltas(expected.model))


@pytest.mark.parametrize("kind", [Trainer, SparseTrainer])
def test_a_trainer_that_is_there_already_trains_it_alike(saved, tmp_path, kind):
    def trainer(model, folder):
        return kind(model, make_args(folder, max_steps=8), train_dataset=Labelled())

    expected = trainer(trainable(saved), tmp_path / "expected")
    found = trainer(PeftModel.from_pretrained(bert(), saved), tmp_path / "found")
    found.model.set_adapter("default")
    for each in (expected, found):
        each.train()
    assert_same_tensors(deltas(found.model), deltas(expected.model))


@pytest.mark.parametrize("stack", ["set alone", "set with it, then frozen"])
def test_a_frozen_source_under_a_task_is_not_driven(saved, tmp_path, stack):
    model = PeftModel.from_pretrained(bert(), saved, adapter_name="source")
    model.add_adapter("task", RandConfig(density=0.05))
    if stack == "set alone":
        model.set_adapter("task")
    else:
        model.set_adapter(["source", "task"])
        model.set_requires_grad("source", requires_grad=False)
    before = copy.deepcopy(deltas(model, "source"))
    args = make_args(tmp_path, max_steps=8, save_strategy="steps", save_steps=4)
    assert optimizer_for(model, args) is None
    assert not list(iter_reselectors(model))
    train(model, torch.optim.SGD(list(model.parameters()), lr=1e-2), range(4))
    Trainer(model, args, train_dataset=Labelled()).train()
    assert_same_tensors(deltas(model, "source"), before)
    assert rate_scales(model, "source") == {}
    assert not list(iter_reselectors(model))
    assert not (tmp_path / "checkpoint-4" / STATE_FILE).exists()


def test_what_is_set_to_be_used_is_not_driven(saved):
    model = PeftModel.from_pretrained(bert(), saved)
    model.base_model.set_adapter("default", inference_mode=True)
    assert rate_scales(model) == {}
    assert not list(iter_reselectors(model))
    model.set_adapter("default")
    drives = "spiel" in model.peft_config["default"].method
    assert len(list(iter_reselectors(model))) == drives
    # Once it trains, it is part of the run while it is switched off, too.
    model.base_model.set_adapter("default", inference_mode=True)
    assert len(list(iter_reselectors(model))) == drives


LOADED = """
import sys
from peft import PeftModel
from transformers import BertConfig, BertForSequenceClassification
import peft_sparse
config = BertConfig.from_pretrained(sys.argv[1] + "/base")
if sys.argv[2] == "trainers are there":
    import transformers.trainer
model = PeftModel.from_pretrained(BertForSequenceClassification(config), sys.argv[1])
if sys.argv[2] == "it is set":
    assert "transformers.trainer" not in sys.modules
    model.set_adapter("default")
if sys.argv[2] == "it is unfrozen":
    model.set_requires_grad("default")
import transformers.trainer
print([c.__name__ for c in transformers.trainer.DEFAULT_CALLBACKS])
"""


@pytest.mark.parametrize("when", ["it is set", "it is unfrozen", "trainers are there", "never"])
def test_trainers_are_told_when_it_is_let_train_and_not_before(tmp_path, interpreter, when):
    model = get_peft_model(bert(), CONFIGS["SpIEL-AG"]())
    model.save_pretrained(tmp_path)
    model.base_model.model.config.save_pretrained(tmp_path / "base")
    told = "ReselectionCallback" in interpreter.run(LOADED, tmp_path, when).stdout
    assert told == (when != "never")

"""Models of a user's own, of which what carries adapters is but a part: an encoder under a head."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertModel, Trainer

from peft_sparse import (
    AdapterAverage,
    AdaSftConfig,
    BottleneckConfig,
    ConfigError,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SparseTrainer,
    SpielAGConfig,
    conflicts,
    iter_deltas,
    iter_reselectors,
    start_dense_phase,
)
from peft_sparse.training.phases.registry import phase_before
from peft_sparse.tuners.common.adapter_config import carrier_of
from peft_sparse.tuners.common.base_model import base_model_of
from tests.support.models import bert
from tests.support.training import BEST, assert_best_is_loaded, assert_same_tensors, make_args

pytestmark = pytest.mark.filterwarnings("ignore")
LINEAR = {"target_modules": r".*\.layer\..*(query|key|value|dense)"}
SPIEL = {"reselection_steps": 2, "estimation_steps": 1, **LINEAR}
TYPES = {
    "rand": lambda: RandConfig(density=0.1, **LINEAR),
    "spiel": lambda: SpielAGConfig(density=0.1, **SPIEL),
    "bottleneck": lambda: BottleneckConfig(bottleneck_size=4),
    "ticket": lambda: LotteryTicketConfig(density=0.1, **LINEAR),
    "gradients": lambda: OneShotConfig(density=0.1, criterion="gradient", selection_batches=2, **LINEAR),
    "masks": lambda: AdaSftConfig(density=0.1, **LINEAR),
}
# Whose weights do not depend on the names of the parameters, as random ones do.
UNNAMED = {
    **{kind: TYPES[kind] for kind in ("ticket", "gradients", "masks")},
    "spiel": lambda: SpielAGConfig(density=0.1, initial_support="gradient", selection_batches=2, **SPIEL),
}
PHASES = ["ticket", "gradients", "masks"]
SAVED = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.0}


class Tagger(nn.Module):
    def __init__(self, encoder, *, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 3)

    def forward(self, input_ids, labels):
        scores = self.head(self.encoder(input_ids).last_hidden_state)
        return {"loss": cross_entropy(scores.flatten(0, 1), labels.flatten()), "logits": scores}


def by_peft(config):
    return get_peft_model(bert(BertModel, seed=3), config)


def by_transformers(config):
    model = bert(BertModel, seed=3)
    model.add_adapter(config, adapter_name="default")
    return model


WAYS = [*((kind, by_peft) for kind in TYPES), ("spiel", by_transformers), ("ticket", by_transformers)]


def rows(n=24):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(bert().config.vocab_size, (n, 6), generator=generator)
    return [{"input_ids": row, "labels": row % 3} for row in ids]


def trainer(folder, model, cls=SparseTrainer, **changes):
    args = make_args(folder, **{**SAVED, **changes})
    return cls(model=model, args=args, train_dataset=rows(), eval_dataset=rows())


def tensors(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", UNNAMED)
def test_it_trains_as_the_whole_model_does_with_the_head_saved(tmp_path, kind):
    part = Tagger(by_peft(UNNAMED[kind]()))
    trainer(tmp_path / "part", part).train()
    config = UNNAMED[kind]()
    config.modules_to_save = ["head"]
    whole = get_peft_model(Tagger(bert(BertModel, seed=3)), config)
    trainer(tmp_path / "whole", whole).train()
    batch = {name: torch.stack([row[name] for row in rows()]) for name in ("input_ids", "labels")}
    found = part.eval()(**batch)["logits"]
    assert torch.equal(found, whole.eval()(**batch)["logits"])
    assert not torch.equal(found, Tagger(bert(BertModel, seed=3)).eval()(**batch)["logits"])


@pytest.mark.parametrize(("kind", "made"), WAYS)
def test_a_run_goes_on_from_any_checkpoint(tmp_path, kind, made):
    model = Tagger(made(TYPES[kind]()))
    trainer(tmp_path / "whole", model).train()
    points = [Path("checkpoint-2"), Path("checkpoint-4")]
    if kind in PHASES:
        _, phase = phase_before(Tagger(made(TYPES[kind]())))
        points += [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / phase.folder).iterdir()]
    for i, point in enumerate(points):
        shutil.copytree(tmp_path / "whole", tmp_path / str(i))
        resumed = Tagger(made(TYPES[kind]()), seed=1)  # another head, which the checkpoint knows
        trainer(tmp_path / str(i), resumed).train(resume_from_checkpoint=str(tmp_path / str(i) / point))
        assert_same_tensors(tensors(resumed), tensors(model))


@pytest.mark.parametrize(("kind", "made"), WAYS)
def test_the_best_checkpoint_is_loaded_whole(tmp_path, kind, made):
    assert_best_is_loaded(trainer(tmp_path, Tagger(made(TYPES[kind]())), **BEST))


@pytest.mark.parametrize(("kind", "made"), WAYS)
def test_the_adapter_is_saved_beside_the_model(tmp_path, kind, made):
    model = Tagger(made(TYPES[kind]()))
    run = trainer(tmp_path, model, save_strategy="no")
    run.train()
    run.save_model(str(tmp_path / "saved"))
    alone = PeftModel.from_pretrained(bert(BertModel, seed=3), str(tmp_path / "saved"))
    ids = torch.stack([row["input_ids"] for row in rows()])
    assert torch.equal(alone(ids).last_hidden_state, model.eval().encoder(ids).last_hidden_state)


@pytest.mark.parametrize("made", [by_peft, by_transformers])
def test_reselection_goes_on_in_a_trainer_of_transformers(tmp_path, made):
    model = Tagger(made(TYPES["spiel"]()))
    trainer(tmp_path, model, Trainer).train()
    (reselector,) = iter_reselectors(model)
    assert reselector.total_steps == 6
    assert len(reselector.history) == 3
    resumed = Tagger(made(TYPES["spiel"]()), seed=1)
    trainer(tmp_path, resumed, Trainer).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_tensors(tensors(resumed), tensors(model))


@pytest.mark.parametrize(("made", "other"), [(by_peft, Trainer), (by_transformers, Trainer), (by_peft, SparseTrainer)])
def test_it_does_not_go_on_with_the_state_of_another_run(tmp_path, made, other, caplog):
    """Under a trainer of transformers the adapter lies in the whole model's file, and nowhere else."""
    trainer(tmp_path / "out", Tagger(made(TYPES["spiel"]())), Trainer).train()
    shutil.move(tmp_path / "out", tmp_path / "kept")
    trainer(tmp_path / "out", Tagger(made(TYPES["spiel"]())), other, data_seed=1).train()
    resumed = Tagger(made(TYPES["spiel"]()), seed=1)
    run = trainer(tmp_path / "out", resumed, Trainer)
    run.train(resume_from_checkpoint=str(tmp_path / "kept" / "checkpoint-2"))
    assert f"belongs to other weights than those that were resumed, in {tmp_path / 'out'}" in caplog.text
    assert run.state.global_step == 6


def test_what_a_trainer_of_transformers_would_not_train_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="are not selected yet, so this trainer would train nothing of them"):
        trainer(tmp_path, Tagger(by_peft(TYPES["ticket"]())), Trainer).train()


def test_a_frozen_model_names_its_adapters(tmp_path):
    model = Tagger(by_peft(TYPES["rand"]())).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"of the adapters \['default'\] and the base model"):
        trainer(tmp_path, model).train()


def test_a_dense_phase_of_ones_own_loop_takes_the_head_back():
    model = Tagger(by_peft(TYPES["ticket"]()))
    before = tensors(model.head)
    phase = start_dense_phase(model)
    with torch.no_grad():
        model.head.weight.add_(1)
        for target in phase.targets:
            target.parameter.add_(torch.rand(target.parameter.shape))
    phase.start_sparse_phase()
    assert_same_tensors(tensors(model.head), before)
    assert sum(model.encoder.peft_config["default"].counts.values()) == sum(d.delta.count for d in phase.targets)


def test_its_adapters_are_compared_and_averaged():
    model = Tagger(by_peft(TYPES["rand"]()))
    model.encoder.add_adapter("other", RandConfig(density=0.1, seed=1, **LINEAR))
    assert conflicts(model) == conflicts(model.encoder)
    average = AdapterAverage(model)
    average.update()
    average.add_to(model, "averaged")
    assert_same_tensors(
        {name: delta.indices for name, *_, delta in iter_deltas(model, "averaged")},
        {name: delta.indices for name, *_, delta in iter_deltas(model)},
    )


# ---- several parts -------------------------------------------------------------------------------------


class Pair(Tagger):
    """Two towers, each of them a model with adapters."""

    def __init__(self, kinds, names=("left", "right")):
        encoders = [
            get_peft_model(bert(BertModel), TYPES[kind](), name) for kind, name in zip(kinds, names, strict=True)
        ]
        super().__init__(encoders[0])
        self.other = encoders[1]

    def forward(self, input_ids, labels):
        states = self.encoder(input_ids).last_hidden_state + self.other(input_ids).last_hidden_state
        scores = self.head(states)
        return {"loss": cross_entropy(scores.flatten(0, 1), labels.flatten()), "logits": scores}


@pytest.mark.parametrize("cls", [SparseTrainer, Trainer])
@pytest.mark.parametrize("kinds", [("rand", "bottleneck"), ("spiel", "spiel")], ids="+".join)
def test_two_parts_train_and_go_on_from_a_checkpoint(tmp_path, kinds, cls):
    model = Pair(kinds)
    trainer(tmp_path, model, cls).train()
    assert [len(reselector.history) for reselector in iter_reselectors(model)] == [3] * kinds.count("spiel")
    resumed = Pair(kinds)
    trainer(tmp_path, resumed, cls).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_tensors(tensors(resumed), tensors(model))


def test_one_of_two_parts_has_no_phase_of_its_own(tmp_path):
    with pytest.raises(ConfigError, match=r"2 parts of this Pair have adapters.*'right'.* dense phase before it"):
        trainer(tmp_path, Pair(["rand", "ticket"])).train()


def test_one_file_does_not_hold_the_state_of_two_adapters_of_one_name(tmp_path):
    with pytest.raises(ConfigError, match="several parts of this Pair have an adapter 'default'"):
        trainer(tmp_path, Pair(["spiel", "spiel"], ["default", "default"])).train()


def test_a_base_model_that_is_kept_beside_its_peft_model_is_no_part_of_its_own():
    model = Tagger(by_peft(TYPES["rand"]()))
    for first in (True, False):
        both = nn.ModuleList([model.encoder, model.encoder.get_base_model()][:: 1 if first else -1])
        assert carrier_of(both) is model.encoder
        assert base_model_of(both) is model.encoder.get_base_model()


def test_adapters_of_a_model_do_not_look_into_its_parts():
    inner = Tagger(by_peft(TYPES["rand"]()))
    config = SpielAGConfig(density=0.1, **{**SPIEL, "target_modules": ["head"]})
    outer = get_peft_model(inner, config, adapter_name="outer")
    assert base_model_of(outer) is inner
    (reselector,) = iter_reselectors(outer)
    assert list(reselector.deltas) == ["head.weight"]

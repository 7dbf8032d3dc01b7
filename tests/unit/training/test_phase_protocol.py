"""A new method of two phases is one class and one config: it is trained, resumed, planned, told by a card and saved."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_sparse import ConfigError, LotteryTicketConfig, SparseConfig, plan_memory
from peft_sparse.checkpoints.card_rows import METHOD_FACTS
from peft_sparse.training.phases.dense_phase import DensePhase
from peft_sparse.training.phases.phase import PHASES, Phase, first_phase
from peft_sparse.training.trainer.resume import find_resume_point
from peft_sparse.tuners.common.config import TARGETS, Stage
from peft_sparse.tuners.sparse_ft.configs.base import METHODS, method_name
from tests.support.training import assert_same_tensors, base_weights, deltas, make_bert, make_trainer

SHORT = {"sequence_length": 8, "task_type": "SEQ_CLS"}


@pytest.fixture
def toy():
    """A two-phase method: one class and one config, and nothing else."""

    @method_name("toy_ticket")
    @dataclass
    class ToyConfig(SparseConfig):
        method: str = field(default="toy_ticket")
        selected_by: ClassVar[str] = "toy"
        patience: int = 3

        @property
        def stages(self):
            first = Stage("toy phase", trains=TARGETS)
            return (first, Stage("sparse phase")) if self.first_phase else super().stages

        @staticmethod
        def card_facts(config):
            return [f"Patience: {config['patience']}"]

    @first_phase
    class ToyPhase(Phase):
        name, args_name, folder, file_name = "toy", "toy_args", "_toy", "toy.pt"

        def __init__(self, model, adapter_name):
            self.model, self.adapter_name, self.began = model, adapter_name, None
            self.config = model.peft_config[adapter_name]
            self.weight = model.base_model.model.bert.encoder.layer[0].attention.self.query.get_base_layer().weight
            self.start = self.weight.detach().clone()

        @classmethod
        def begin(cls, trainer, adapter_name):
            return cls(trainer.model, adapter_name)

        numel = property(lambda self: self.weight.numel())

        def __enter__(self):
            self.weight.requires_grad_(True)
            return self

        def select(self):
            from peft_sparse import iter_deltas

            moved = (self.weight.detach() - self.start).abs().flatten()
            for _, _, _, delta in iter_deltas(self.model, self.adapter_name):
                delta.set_support(moved.topk(self.config.num_weights).indices.sort().values.to(delta.indices.dtype))
            self.config.counts = {n: d.count for n, _, _, d in iter_deltas(self.model, self.adapter_name)}

        def save(self, directory):
            torch.save(self.weight.detach(), f"{directory}/toy.pt")

        def load(self, directory):
            self.weight.data.copy_(torch.load(f"{directory}/toy.pt", weights_only=True))

        def __exit__(self, *error):
            self.weight.data.copy_(self.start)
            self.weight.grad = None
            self.weight.requires_grad_(False)

    yield lambda: get_peft_model(make_bert(), ToyConfig(num_weights=20, target_modules=r".*layer\.0\..*query"))
    del PHASES["toy"], METHODS["toy_ticket"], METHOD_FACTS["toy_ticket"]


def test_a_toy_method_trains_and_resumes_in_both_phases(toy, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "toy_args": {"max_steps": 4}}

    def trainer(model):
        own = make_trainer(tmp_path, model=model, **{k: v for k, v in settings.items() if k != "toy_args"})
        own.toy_args = settings["toy_args"]
        return own

    model = toy()
    before = {n: t.clone() for n, t in base_weights(model).items()}
    whole = trainer(model)
    whole.train()
    assert (whole.toy_state.global_step, whole.state.global_step) == (4, 4)
    assert sum(len(indices) for indices, _ in deltas(model).values()) == 20
    assert_same_tensors(base_weights(model), before)
    point = find_resume_point(str(tmp_path), str(tmp_path / "_toy" / "checkpoint-2"), "toy")
    assert point.phase == "toy"
    resumed = trainer(toy())
    resumed.train(resume_from_checkpoint=point.path)
    assert_same_tensors(deltas(resumed.model), deltas(model))


def test_a_toy_method_is_planned_by_what_its_config_says(toy):
    model = toy()
    request, base = model.peft_config["default"], model.config
    plan = plan_memory(base, request, **SHORT)
    assert [phase.name for phase in plan.phases] == ["toy phase", "sparse phase"]
    assert (plan.method, plan.num_trained) == ("toy_ticket", 20)
    # The targets themselves train in the first: one gradient and one copy of the only target.
    target = base.hidden_size**2 * 4
    assert plan.phases[0].all_gradients == plan.phases[0].parts["optimizer states"] / 2 == target
    assert sum(plan.phases[0].host.values()) == target
    assert plan.phases[1].all_gradients == 20 * 4
    with pytest.raises(ConfigError, match="'toy_ticket' do not go together: the weights themselves train"):
        plan_memory(base, request, **SHORT, load_in_4bit=True)
    chosen = replace(request, counts={"bert.encoder.layer.0.attention.self.query.weight": 20})
    assert [phase.name for phase in plan_memory(base, chosen, **SHORT).phases] == ["training"]
    assert chosen.takes_quantised_base


def test_a_toy_adapter_has_a_card_and_loads(toy, tmp_path):
    model = toy()
    own = make_trainer(tmp_path / "run", model=model, max_steps=2)
    own.toy_args = {"max_steps": 2}
    own.train()
    model.save_pretrained(tmp_path / "adapter")
    lines = (tmp_path / "adapter" / "README.md").read_text().splitlines()
    assert "- Method: `toy_ticket`" in lines
    assert "- Patience: 3" in lines
    assert "- Tuned weights: 20 in 1 tensors, 7.81% of their elements" in lines
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "adapter")
    assert type(loaded.peft_config["default"]).__name__ == "ToyConfig"
    assert loaded.peft_config["default"].patience == 3
    assert any(values.abs().sum() > 0 for _, values in deltas(model).values())
    assert_same_tensors(deltas(loaded), deltas(model))


def test_names_are_of_one_phase_each():
    with pytest.raises(ConfigError, match="of no other phase, got 'dense'"):
        first_phase(type("Other", (DensePhase,), {"__qualname__": "Other"}))
    assert LotteryTicketConfig(num_weights=3).first_phase == "dense"
    assert LotteryTicketConfig(num_weights=3, counts={"a": 3}).first_phase is None

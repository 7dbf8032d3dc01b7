from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from peft import get_peft_model
from tiny_training import assert_same_tensors, base_weights, deltas, make_bert, make_trainer

from peft_sparse import ConfigError, LotteryTicketConfig, SparseConfig
from peft_sparse.training.phases.dense_phase import DensePhase
from peft_sparse.training.phases.phase import PHASES, Phase, first_phase
from peft_sparse.training.trainer.resume import find_resume_point
from peft_sparse.tuners.sparse_ft.configs.base import METHODS, method_name


@pytest.fixture
def toy():
    """A two-phase method: one class and one config, and nothing else."""

    @method_name("toy_ticket")
    @dataclass
    class ToyConfig(SparseConfig):
        method: str = field(default="toy_ticket")
        selected_by: ClassVar[str] = "toy"

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
    del PHASES["toy"], METHODS["toy_ticket"]


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


def test_names_are_of_one_phase_each():
    with pytest.raises(ConfigError, match="of no other phase, got 'dense'"):
        first_phase(type("Other", (DensePhase,), {"__qualname__": "Other"}))
    assert LotteryTicketConfig(num_weights=3).first_phase == "dense"
    assert LotteryTicketConfig(num_weights=3, counts={"a": 3}).first_phase is None

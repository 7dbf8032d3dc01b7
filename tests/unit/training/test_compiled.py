"""Under torch.compile weights are chosen, grown and scaled as without it: compiled graphs show what they compute."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Trainer

from peft_sparse import (
    AdaSftConfig,
    ConfigError,
    LotteryTicketConfig,
    OneShotConfig,
    SpielAGConfig,
    iter_deltas,
    iter_reselectors,
    rate_scales,
    select_by_gradients,
    start_dense_phase,
)
from tests.support.training import Labelled, deltas, make_args, make_bert, make_trainer

TARGETS = {"target_modules": ["tokens", "twice", "last"], "target_norms": True}
SPIEL = {"density": 0.2, "reselection_steps": 3, "estimation_steps": 2, "total_steps": 12, **TARGETS}


class Net(nn.Module):
    """An embedding, a linear layer that is used twice, a norm, and another linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.twice = nn.Embedding(12, 8), nn.Linear(8, 8)
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, ids):
        x = self.tokens(ids)
        return self.last(self.norm(self.twice(torch.tanh(self.twice(x)))))


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 12, (4, 5), generator=generator) for _ in range(count)]


def loss(model, batch):
    return model(batch).square().mean()


def train(model, called, *, updates=9, micro_batches=1):
    """What a run chose and learnt: {tensor: (indices, values)}."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for number, batch in enumerate(batches(updates * micro_batches), 1):
        loss(called, batch).backward()
        if number % micro_batches == 0:
            optimizer.step()
            optimizer.zero_grad()
    return deltas(model)


def compiled(model, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(model, backend=backend)


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, (indices, values) in wanted.items():
        assert torch.equal(found[name][0], indices), name
        torch.testing.assert_close(found[name][1], values)


@pytest.mark.parametrize("options", [{}, {"nomination_updates": 1, "budget": "global"}])
def test_spiel_grows_the_same_weights(options):
    plain, traced = (get_peft_model(Net(), SpielAGConfig(**SPIEL, **options)) for _ in range(2))
    wanted = train(plain, plain, micro_batches=2)
    assert_equal(train(traced, compiled(traced), micro_batches=2), wanted)
    (reselector,), (own,) = iter_reselectors(plain), iter_reselectors(traced)
    assert [r.share_replaced for r in own.history] == [r.share_replaced for r in reselector.history]
    assert len(own.history) == 3
    assert all(reselection.share_replaced > 0 for reselection in own.history)


def test_windows_do_not_compile_anew():
    model = get_peft_model(Net(), SpielAGConfig(**SPIEL))
    counter = CompileCounterWithBackend("eager")
    train(model, compiled(model, counter), updates=12)
    assert counter.frame_count == 2  # with an open window and without


def test_gradients_choose_the_same_weights():
    found = []
    for wrap in (lambda model: model, compiled):
        model = get_peft_model(Net(), OneShotConfig(density=0.2, criterion="fisher", budget="uniform", **TARGETS))
        chosen = select_by_gradients(wrap(model), batches(3), loss_fn=loss)
        found.append({name: (d.indices, d.values) for name, _, _, d in iter_deltas(model)})
        assert chosen.keys() == found[0].keys()
    assert_equal(found[1], found[0])
    assert sum(indices.numel() for indices, _ in found[0].values()) > 0


def test_a_phase_begun_on_the_compiled_model_is_the_model_s():
    model = get_peft_model(Net(), LotteryTicketConfig(density=0.2, **TARGETS))
    seen = compiled(model)
    assert [name for name, *_ in iter_deltas(seen)] == [name for name, *_ in iter_deltas(model)]
    start_dense_phase(seen)
    with pytest.raises(ConfigError, match="dense phase"):
        start_dense_phase(model)


@pytest.mark.parametrize("config", [LotteryTicketConfig, AdaSftConfig])
def test_a_trainer_goes_through_both_phases(config, tmp_path):
    found = []
    for wrap in (lambda model: model, partial(compiled, backend="eager")):
        share = {"density": 0.02} if config is LotteryTicketConfig else {}
        model = get_peft_model(make_bert(dropout=0.0, layers=1), config(**share, target_modules="all-linear"))
        trainer = make_trainer(tmp_path, model=wrap(model), remove_unused_columns=False)
        trainer.train()
        trainer.save_model(tmp_path / "out")
        saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
        found.append({name: tensor for name, tensor in saved.items() if "digest" not in name})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


def test_a_stopped_run_goes_on_to_the_last_bit(tmp_path):
    def run(**more):
        config = SpielAGConfig(density=0.02, reselection_steps=3, estimation_steps=2)
        model = get_peft_model(make_bert(layers=1), config)
        how = {"save_strategy": "steps", "save_steps": 4, "remove_unused_columns": False}
        make_trainer(tmp_path, model=compiled(model, backend="eager"), **how).train(**more)
        return deltas(model)

    whole = run()
    assert_equal(run(resume_from_checkpoint=str(tmp_path / "checkpoint-4")), whole)


def test_a_trainer_of_another_library_refuses_a_first_phase(tmp_path):
    model = compiled(get_peft_model(make_bert(), LotteryTicketConfig(density=0.02)), backend="eager")
    with pytest.raises(ConfigError, match=r"would train nothing of them\. Train with SparseSFTTrainer"):
        Trainer(model=model, args=make_args(tmp_path), train_dataset=Labelled()).train()


def test_a_fitted_rate_is_the_same():
    found = []
    for wrap in (lambda model: model, compiled):
        model = get_peft_model(Net(), SpielAGConfig(**SPIEL, fitted_rate=True))
        values = train(model, wrap(model))
        found.append((values, rate_scales(model)))
    assert_equal(found[1][0], found[0][0])
    assert found[1][1] == pytest.approx(found[0][1])
    assert set(found[0][1].values()) != {1.0}


def test_a_copy_shows_its_gradients_to_itself():
    model = get_peft_model(Net(), SpielAGConfig(**SPIEL, fitted_rate=True))
    other = copy.deepcopy(model)
    loss(compiled(other), batches(1)[0]).backward()
    taps = {m: [d.observer for _, _, _, d in iter_deltas(m)] for m in (model, other)}
    assert all(tap.estimate is None for tap in taps[model])
    assert all(tap.estimate is not None for tap in taps[other])
    meters = {m: [d.meter for name, _, _, d in iter_deltas(m) if d.meter is not None] for m in (model, other)}
    assert all(meter.total is None for meter in meters[model])
    assert [meter.tokens for meter in meters[other]] == [40, 20]


def test_gradients_that_a_loop_takes_of_something_else_do_not_count():
    model = get_peft_model(Net(), SpielAGConfig(**SPIEL))
    called = compiled(model)
    result = called(batches(1)[0])
    torch.autograd.grad(result.sum(), [d.values for name, _, _, d in iter_deltas(model) if "last" in name])
    assert all(d.observer.estimate is None for name, _, _, d in iter_deltas(model) if "last" not in name)


def test_an_exported_program_is_torch_s_alone():
    model = get_peft_model(Net(), SpielAGConfig(**SPIEL))
    exported = torch.export.export(model.base_model.model, (batches(1)[0],))
    assert "peft_sparse" not in str(exported.graph)

"""Weight decay acts on sparse deltas alone: not on heads, and on norms too, through any trainer."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer

from peft_sparse import RandConfig, SparseAdamW, SparseTrainer, SpielAGConfig, iter_deltas, parameter_groups
from tests.support.training import Labelled, make_args, make_bert

LR, DECAY = 1e-3, 30.0
WHAT = {"target_norms": True, "target_biases": True, "modules_to_save": ["classifier"], "init_weights": False}
SPIEL = {"reselection_steps": 5, "estimation_steps": 3}


def make(kind=SpielAGConfig):
    torch.manual_seed(3)
    calendar = SPIEL if kind is SpielAGConfig else {}
    return get_peft_model(make_bert(dropout=0.0), kind(density=0.1, **calendar, **WHAT))


def trained(folder, trainer, *, weight_decay, kind=SpielAGConfig, max_steps=1, resume=None, **more):
    model = make(kind)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    args = make_args(
        folder, learning_rate=LR, weight_decay=weight_decay, max_steps=max_steps, lr_scheduler_type="constant", **more
    )
    running = trainer(model=model, args=args, train_dataset=Labelled())
    running.train(resume_from_checkpoint=resume)
    return model, before, running


def values_of(model):
    named = {id(p): n for n, p in model.named_parameters()}
    return {named[id(delta.values)] for *_, delta in iter_deltas(model)}


@pytest.mark.parametrize(
    ("trainer", "kind"), [(Trainer, SpielAGConfig), (SparseTrainer, SpielAGConfig), (SparseTrainer, RandConfig)]
)
def test_one_update_decays_deltas_and_nothing_else(tmp_path, trainer, kind):
    decayed, before, _ = trained(tmp_path, trainer, weight_decay=DECAY, kind=kind)
    plain, _, _ = trained(tmp_path, trainer, weight_decay=0.0, kind=kind)
    deltas, other = values_of(plain), dict(plain.named_parameters())
    assert any("LayerNorm" in name for name in deltas)
    assert any("bias" in name for name in deltas)
    heads = 0
    for name, parameter in decayed.named_parameters():
        if not parameter.requires_grad:
            continue
        pulled = LR * DECAY * before[name] if name in deltas else torch.zeros_like(before[name])
        torch.testing.assert_close(parameter, other[name] - pulled, rtol=1e-4, atol=1e-7)
        heads += name not in deltas
    assert heads == 2


@pytest.mark.parametrize("trainer", [Trainer, SparseTrainer])
def test_a_resumed_run_equals_one_that_went_through(tmp_path, trainer):
    whole, _, _ = trained(tmp_path / "whole", trainer, weight_decay=DECAY, max_steps=6)
    half = {"save_strategy": "steps", "save_steps": 4}
    trained(tmp_path / "half", trainer, weight_decay=DECAY, max_steps=6, **half)
    again, _, _ = trained(
        tmp_path / "half", trainer, weight_decay=DECAY, max_steps=6, resume=str(tmp_path / "half" / "checkpoint-4")
    )
    for (name, first), second in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second), name


def test_a_checkpoint_keeps_the_order_of_transformers(tmp_path):
    """So that one of an older version, or of a plain trainer, can be resumed."""
    _, _, running = trained(tmp_path, SparseTrainer, weight_decay=DECAY, max_steps=2)
    optimizer = getattr(running.optimizer, "optimizer", running.optimizer)
    rule = set(Trainer.get_decay_parameter_names(running, running.model))
    named = [(n, p) for n, p in running.model.named_parameters() if p.requires_grad]
    theirs = [[p for n, p in named if (n in rule) == side] for side in (True, False)]
    saved = optimizer.state_dict()
    assert [len(group["params"]) for group in saved["param_groups"]] == [len(part) for part in theirs]
    for number, parameter in enumerate([*theirs[0], *theirs[1]]):
        assert torch.equal(saved["state"][number]["exp_avg"], optimizer.state[parameter]["exp_avg"])
    held = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    assert held == [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, 0.0]


def test_groups_of_ones_own_stay(tmp_path):
    model = make()
    trained = [p for p in model.parameters() if p.requires_grad]
    own = SparseAdamW([{"params": trained[:5], "weight_decay": 0.1}, {"params": trained[5:]}], lr=LR)
    args = make_args(tmp_path, max_steps=1)
    Trainer(model=model, args=args, train_dataset=Labelled(), optimizers=(own, None)).train()
    assert [[id(p) for p in group["params"]] for group in own.param_groups] == [
        [id(p) for p in trained[:5]],
        [id(p) for p in trained[5:]],
    ]


def test_a_plain_trainer_of_fixed_supports_takes_them(tmp_path):
    def run(weight_decay: float):
        model = make(RandConfig)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        args = make_args(tmp_path, learning_rate=LR, max_steps=1, lr_scheduler_type="constant")
        optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=weight_decay), lr=LR)
        Trainer(model=model, args=args, train_dataset=Labelled(), optimizers=(optimizer, None)).train()
        return model, before

    (decayed, before), (plain, _) = run(DECAY), run(0.0)
    deltas, other = values_of(plain), dict(plain.named_parameters())
    for name, start in before.items():
        pulled = LR * DECAY * start if name in deltas else torch.zeros_like(start)
        torch.testing.assert_close(decayed.get_parameter(name), other[name] - pulled, rtol=1e-4, atol=1e-7)


def test_groups_for_a_loop_of_ones_own():
    model = make()
    named = {id(p): n for n, p in model.named_parameters()}
    decayed, others = parameter_groups(model, weight_decay=DECAY)
    assert {named[id(p)] for p in decayed["params"]} == values_of(model)
    assert {named[id(p)].rsplit(".", 1)[-1] for p in others["params"]} == {"weight", "bias"}
    assert (decayed["weight_decay"], others["weight_decay"]) == (DECAY, 0.0)

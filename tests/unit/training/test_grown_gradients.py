"""Moments of grown weights are seeded as large as the clipped gradients that will follow."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model

from peft_sparse import SparseTrainer, SpielAGConfig, SpielMAConfig, iter_deltas, iter_reselectors
from peft_sparse.errors import ConfigError
from peft_sparse.optim.sparse_adamw import SparseAdamW
from tests.support.training import Labelled, make_args, make_bert

FIELDS = {"density": 0.05, "reselection_steps": 4, "estimation_steps": 2, "total_steps": 20}
BETAS = (0.9, 0.999)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 40, (4, 6), generator=generator)
    return {"input_ids": ids, "labels": ids[:, 0] % 3}


def seeded(max_grad_norm, *, replace_all_first=True):
    """First and second moments of grown weights right after the first reselection, and the squared norm of the
    gradients of all that stays."""
    model = get_peft_model(
        make_bert(dropout=0.0),
        SpielAGConfig(
            **FIELDS, max_grad_norm=max_grad_norm, modules_to_save=["classifier"], replace_all_first=replace_all_first
        ),
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = SparseAdamW(trainable, lr=1e-3, betas=BETAS)
    deltas = {name: delta for name, _, _, delta in iter_deltas(model)}
    for step in range(2):
        optimizer.zero_grad()
        model(**batch(step)).loss.backward()
        before = {name: (delta.indices.clone(), delta.held_values.grad.clone()) for name, delta in deltas.items()}
        optimizer.step()
    (reselector,) = iter_reselectors(model)
    grown = {name: at == 2 for name, at in reselector.grown_at().items()}
    held = [id(delta.held_values) for delta in deltas.values()]
    stays = sum(float(p.grad.square().sum()) for p in trainable if id(p) not in held)
    for name, (old, gradient) in before.items():
        kept = deltas[name].indices[~grown[name]]
        stays += float(gradient[torch.isin(old, kept)].square().sum())
    moments = [(optimizer.state[delta.held_values], grown[name]) for name, delta in deltas.items()]
    return [s["exp_avg"][g].double() for s, g in moments], [s["exp_avg_sq"][g].double() for s, g in moments], stays


@pytest.mark.parametrize("replace_all_first", [True, False])
def test_seeds_are_clipped_as_the_new_supports_gradients_will_be(replace_all_first):
    means, squares, stays = seeded(None, replace_all_first=replace_all_first)
    # Two updates old, so biased down by as much; what is left is the mean square of each weight's gradient.
    norm = math.sqrt(sum(float(part.sum()) for part in squares) / (1 - BETAS[1] ** 2) + stays)
    clipped_means, clipped_squares, _ = seeded(norm / 5, replace_all_first=replace_all_first)
    for whole, clipped in zip(means, clipped_means, strict=True):
        torch.testing.assert_close(clipped, whole / 5, rtol=1e-5, atol=0)
    for whole, clipped in zip(squares, clipped_squares, strict=True):
        torch.testing.assert_close(clipped, whole / 25, rtol=1e-5, atol=0)


def test_a_limit_that_is_not_reached_changes_nothing():
    for whole, clipped in zip(seeded(None)[0], seeded(1e6)[0], strict=True):
        assert torch.equal(whole, clipped)


@pytest.mark.parametrize(("asked", "of_the_trainer", "used"), [(None, 0.5, 0.5), (None, 0.0, None), (2.0, 0.5, 2.0)])
def test_a_trainer_says_what_it_clips_to(tmp_path, asked, of_the_trainer, used):
    model = get_peft_model(make_bert(dropout=0.0), SpielAGConfig(**FIELDS, max_grad_norm=asked))
    args = make_args(tmp_path, max_steps=1, max_grad_norm=of_the_trainer)
    SparseTrainer(model=model, args=args, train_dataset=Labelled()).train()
    (reselector,) = iter_reselectors(model)
    assert reselector.max_grad_norm == used


@pytest.mark.parametrize("value", [0, -1.0, math.inf])
def test_a_senseless_limit_is_refused(value):
    with pytest.raises(ConfigError, match=r"max_grad_norm must be a finite number > 0 or None, got"):
        SpielMAConfig(**FIELDS, max_grad_norm=value)

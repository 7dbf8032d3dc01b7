"""SpIEL-MA: which weights may grow, and how large their first steps are under optimizers that know no ages."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_sparse import SM3, SparseAdamW, SpielMAConfig, iter_deltas, iter_reselectors

SHAPE, LR, BETAS, EPS = (12, 10), 1e-3, (0.9, 0.999), 1e-8
FIELDS = {"density": 0.3, "target_modules": ["layer"], "estimation_steps": 1, "total_steps": 2000}


class Slope(nn.Module):
    """A loss whose gradient is a matrix of one's choice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SHAPE[1], SHAPE[0], bias=False)

    def forward(self, gradient):
        identity = torch.eye(SHAPE[1])
        return (self.layer(identity).T * gradient).sum()


def gradients(update):
    """Row and column sizes that differ tenfold, with a sign and some noise."""
    generator = torch.Generator().manual_seed(update)
    rows, columns = torch.logspace(-2, -1, SHAPE[0]), torch.logspace(-1, 0, SHAPE[1])
    return rows[:, None] * columns * (1 + 0.3 * torch.randn(SHAPE, generator=generator))


def run(make_optimizer, *, reselect_after, updates, meddle=lambda update, delta: None, **fields):
    """(delta, reselector, the optimizer, values after each update as {flat position: value}, supports)."""
    torch.manual_seed(0)
    model = get_peft_model(
        Slope(),
        SpielMAConfig(**FIELDS, reselection_steps=reselect_after, replace_all_first=False, **fields),
    )
    ((_, _, _, delta),) = iter_deltas(model)
    (reselector,) = iter_reselectors(model)
    reselector.skip_to(1)  # the first reselection comes after 1 + S updates
    optimizer = make_optimizer([delta.values], [delta])
    history = []
    for update in range(updates):
        optimizer.zero_grad()
        model(gradients(update)).backward()
        meddle(update, delta)
        optimizer.step()
        history.append(dict(zip(delta.indices.tolist(), delta.values.tolist(), strict=True)))
    return delta, reselector, optimizer, history


def adamw(parameters, _deltas):
    return torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)


@pytest.mark.parametrize("before", [20, 300])
def test_grown_weights_under_adamw_step_as_a_float64_reference(before):
    _, reselector, _, history = run(adamw, reselect_after=before, updates=before + 30)
    (reselection,) = reselector.history[:1]
    assert reselection.update == before + 1
    old, new = set(history[before - 2]), set(history[before - 1])
    grown = new - old
    assert len(grown) == round(reselection.share_replaced * 36) > 3
    # The accumulators of SM3-II over the tuned weights of all updates so far.
    rows, columns = [0.0] * SHAPE[0], [0.0] * SHAPE[1]
    for update in range(before):
        seen = gradients(update).double()
        estimates = {j: min(rows[j // 10], columns[j % 10]) + float(seen[j // 10, j % 10]) ** 2 for j in old}
        for j, estimate in estimates.items():
            rows[j // 10], columns[j % 10] = max(rows[j // 10], estimate), max(columns[j % 10], estimate)
    for j in grown:
        value, m, own, largest = 0.0, 0.0, 0.0, 0.0
        v = math.sqrt(rows[j // 10] * columns[j % 10]) / before * (1 - BETAS[1] ** before)
        own_m = own_v = 0.0
        for update in range(before, before + 15):
            g, t, age = float(gradients(update)[j // 10, j % 10]), update + 1, update + 1 - before
            m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
            step = LR * (m / (1 - BETAS[0] ** t)) / (math.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
            value -= step
            assert history[update][j] == pytest.approx(value, rel=2e-3)
            # What a weight that Adam had begun with now would do: hardly more than the learning rate.
            own_m, own_v = BETAS[0] * own_m + (1 - BETAS[0]) * g, BETAS[1] * own_v + (1 - BETAS[1]) * g * g
            own += (own_m / (1 - BETAS[0] ** age)) / math.sqrt(own_v / (1 - BETAS[1] ** age))
            largest = max(largest, abs(step) / LR)
        assert largest < 1.5
        assert 0.1 * own < -history[before + 14][j] / LR < 1.1 * own


def test_with_an_age_for_each_weight_grown_ones_start_like_new_parameters():
    _, _, _, history = run(
        lambda parameters, _: SparseAdamW(parameters, lr=LR, betas=BETAS, eps=EPS), reselect_after=20, updates=21
    )
    grown = set(history[19]) - set(history[18])
    assert grown
    for j in grown:
        assert abs(history[20][j]) == pytest.approx(LR, rel=1e-3)


@pytest.mark.parametrize("make_optimizer", [adamw, lambda p, deltas: SM3(p, lr=LR, deltas=deltas)])
def test_any_weight_may_grow_but_those_tuned_before(make_optimizer):
    """The authors' code: a weight that was just dropped stays out. Algorithm 3 could grow it again at once."""

    def make_the_best_weak(update, delta):
        if update == 5:
            with torch.no_grad():
                delta.values[-1] = 0.0  # of the last row, whose gradients are the largest

    _, reselector, _, history = run(make_optimizer, reselect_after=6, updates=6, meddle=make_the_best_weak)
    old, new = history[4], history[5]
    dropped, grown = set(old) - set(new), set(new) - set(old)
    rows, columns = (c.double() for c in reselector._covers._covers["layer.weight"])
    score = {j: float(rows[j // 10] * columns[j % 10]) for j in range(120)}
    free = sorted(set(range(120)) - set(old), key=lambda j: -score[j])
    assert grown == set(free[: len(grown)])
    assert len(grown) == len(dropped) == 7
    # By Algorithm 3 as it is printed some of those dropped would have come back.
    by_the_letter = sorted(set(range(120)) - (set(old) - dropped), key=lambda j: -score[j])[: len(grown)]
    assert set(by_the_letter) & dropped
    assert all(new[j] == 0.0 for j in grown)


def test_a_resumed_run_seeds_alike():
    """The number of updates in the accumulators is part of the training state."""
    _, reselector, _, _ = run(adamw, reselect_after=50, updates=10)
    state = reselector.state_dict()
    indices = torch.tensor([3, 40, 99])
    seeds = reselector._covers.grown_gradients("layer.weight", indices)
    _, other, _, _ = run(adamw, reselect_after=50, updates=3)
    other.deltas["layer.weight"].set_support(reselector.deltas["layer.weight"].indices)
    other.load_state_dict(state)
    again = other._covers.grown_gradients("layer.weight", indices)
    assert torch.equal(seeds.mean_square, again.mean_square)
    assert bool(seeds.mean_square.gt(0).all())
    # A state of an older version does not say: the updates of the training are what is known.
    del state["covers.updates.layer.weight"]
    other.load_state_dict(state)
    older = other._covers.grown_gradients("layer.weight", indices)
    torch.testing.assert_close(older.mean_square, seeds.mean_square * 10 / 11)

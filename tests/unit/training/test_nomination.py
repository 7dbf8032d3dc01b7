"""Candidates over whole updates, supports to start from, and what is dropped: against slow references."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_sparse import (
    OneShotConfig,
    SparseAdamW,
    SparseTrainer,
    SpielAGConfig,
    SpielMAConfig,
    iter_deltas,
    iter_reselectors,
    select_by_gradients,
)
from peft_sparse.errors import ConfigError
from tests.support.training import Labelled, make_args, make_bert

SHAPE = (9, 8)
FIELDS = {"num_weights": 12, "target_modules": ["layer"], "total_steps": 1000, "reselection_steps": 50}


class Slope(nn.Module):
    """A loss whose gradient is the matrix that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SHAPE[1], SHAPE[0], bias=False)

    def forward(self, gradient):
        return (self.layer(torch.eye(SHAPE[1])).T * gradient).sum()


def gradient(number):
    generator = torch.Generator().manual_seed(number)
    signal = torch.randn(SHAPE, generator=torch.Generator().manual_seed(999))
    return signal + torch.randn(SHAPE, generator=generator)


def made(**fields):
    torch.manual_seed(0)
    model = get_peft_model(Slope(), SpielAGConfig(**{**FIELDS, **fields}))
    ((_, _, _, delta),) = iter_deltas(model)
    (reselector,) = iter_reselectors(model)
    return model, delta, reselector


def train(model, optimizer, updates, *, micro_batches=1, max_norm=None, skip=(), between=lambda update: None):
    for update in updates:
        for part in range(micro_batches):
            model(gradient(update * micro_batches + part)).backward()
        if update in skip:
            optimizer.zero_grad()
            continue
        if max_norm is not None:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm)
        optimizer.step()
        optimizer.zero_grad()
        between(update)


def sgd(delta):
    return torch.optim.SGD([delta.values], lr=0.0)


def largest(sums, count):
    return set(sums.flatten().abs().topk(count).indices.tolist())


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("updates", [1, 3])
def test_candidates_are_the_largest_sums_over_whole_updates(updates, micro_batches):
    """With as many tracked as there are weights nothing is forgotten, so the sums are those of all gradients."""
    model, delta, reselector = made(nomination_updates=updates, estimation_steps=4, candidates_per_weight=3.0)
    assert delta.numel == 2 * 36
    tap = reselector._taps["layer.weight"]
    train(model, sgd(delta), range(updates), micro_batches=micro_batches)
    sums = sum(gradient(i).double() for i in range(updates * micro_batches))
    estimate = tap.estimate
    assert set(estimate.indices[estimate.nominated].tolist()) == largest(sums, 36)
    torch.testing.assert_close(estimate.total.double(), sums.flatten()[estimate.indices.long()], rtol=1e-5, atol=1e-5)
    per_update = [
        sum(gradient(u * micro_batches + part).double() for part in range(micro_batches)) for u in range(updates)
    ]
    squares = sum(g.square() for g in per_update)
    torch.testing.assert_close(
        estimate.total_squared.double(), squares.flatten()[estimate.indices.long()], rtol=1e-5, atol=1e-5
    )
    assert estimate.updates == updates
    # From here on only the candidates are watched.
    assert tap.wanted() is not None


def reference_of_tracking(gradients, *, tracked, count):
    """The largest sums of what is kept: dictionaries, one micro-batch after the other."""
    sums = {}
    for g in gradients:
        total = {j: float(v) + sums.get(j, 0.0) for j, v in enumerate(g.double().flatten())}
        kept = sorted(total, key=lambda j: (-abs(total[j]), j))[:tracked]
        sums = {j: total[j] for j in kept}
    return set(sorted(sums, key=lambda j: -abs(sums[j]))[:count])


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_tracking_equals_a_slow_reference_and_memory_is_bounded(max_norm):
    model, delta, reselector = made(nomination_updates=4, estimation_steps=5)
    tap, sizes = reselector._taps["layer.weight"], []
    optimizer = sgd(delta)
    train(model, optimizer, range(4), max_norm=None, between=lambda _: sizes.append(tap.estimate.indices.numel()))
    estimate = tap.estimate
    expected = reference_of_tracking([gradient(i) for i in range(4)], tracked=24, count=12)
    # Probes, which are active weights, are tracked besides, and may be large too.
    found = set(estimate.indices[estimate.nominated].tolist())
    assert len(found & expected) >= 11
    assert max(sizes) <= 24 + 12
    # More than the first micro-batch finds.
    truth = largest(sum(gradient(i) for i in range(4)), 12)
    assert len(found & truth) > len(largest(gradient(0), 12) & truth)


def test_clipped_updates_are_summed_in_one_unit():
    """Else what came before would not count beside a gradient that has yet to be clipped."""
    plain, delta, reselector = made(nomination_updates=4, estimation_steps=5)
    train(plain, sgd(delta), range(4))
    clipped, other_delta, other = made(nomination_updates=4, estimation_steps=5)
    norm = float(gradient(0).flatten()[other_delta.indices.long()].norm())
    train(clipped, sgd(other_delta), range(4), max_norm=norm * 1e-3)
    first, second = (r._taps["layer.weight"].estimate for r in (reselector, other))
    one, two = (set(e.indices[e.nominated].tolist()) for e in (first, second))
    assert len(one & two) >= 10
    assert float(second.total.abs().max()) < 1e-2 * float(first.total.abs().max())


def test_a_skipped_update_leaves_no_trace():
    model, delta, reselector = made(nomination_updates=2, estimation_steps=3, candidates_per_weight=3.0)
    train(model, sgd(delta), range(3), micro_batches=2, skip={1})
    estimate = reselector._taps["layer.weight"].estimate
    sums = sum(gradient(i).double() for i in (0, 1, 4, 5))
    torch.testing.assert_close(estimate.total.double(), sums.flatten()[estimate.indices.long()], rtol=1e-5, atol=1e-5)
    assert estimate.updates == 2


def test_a_window_that_was_interrupted_while_it_nominates_goes_on():
    whole, delta, reselector = made(nomination_updates=3, estimation_steps=4)
    train(whole, sgd(delta), range(2))
    state = {name: tensor.clone() for name, tensor in reselector.state_dict().items()}
    again, other_delta, other = made(nomination_updates=3, estimation_steps=4)
    other.load_state_dict(state)
    train(whole, sgd(delta), range(2, 3))
    train(again, sgd(other_delta), range(2, 3))
    first, second = (r._taps["layer.weight"].estimate for r in (reselector, other))
    shared = set(first.indices[first.nominated].tolist())
    assert shared == set(second.indices[second.nominated].tolist())
    del state["window.scale.layer.weight"]  # as an older version wrote it
    other.load_state_dict(state)


@pytest.mark.parametrize("value", [-1, 6, 1.0, True])
def test_senseless_numbers_of_updates_are_refused(value):
    with pytest.raises(
        ConfigError, match=r"nomination_updates must be (an int >= 0|at most estimation_steps \(5\)), got"
    ):
        SpielAGConfig(density=0.1, nomination_updates=value)


# ---- the support to start from ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SpielAGConfig, SpielMAConfig])
def test_a_first_support_by_gradients_is_that_of_one_shot(kind):
    batches = [{"gradient": gradient(i)} for i in range(5)]

    def loss(model, batch):
        return model(batch["gradient"])

    torch.manual_seed(0)
    common = {"num_weights": 12, "target_modules": ["layer"], "selection_batches": 3}
    once = get_peft_model(Slope(), OneShotConfig(**common, criterion="gradient", budget="uniform"))
    spiel = get_peft_model(
        Slope(), kind(**common, initial_support="gradient", estimation_steps=2, reselection_steps=4, total_steps=100)
    )
    for model in (once, spiel):
        select_by_gradients(model, batches, loss_fn=loss)
    ((_, _, _, first),), ((_, _, _, second),) = iter_deltas(once), iter_deltas(spiel)
    assert torch.equal(first.indices, second.indices)
    assert set(first.indices.tolist()) == largest(sum(gradient(i) for i in range(3)), 12)
    optimizer = SparseAdamW([second.values], lr=1e-2)
    train(spiel, optimizer, range(2))
    (reselector,) = iter_reselectors(spiel)
    # A fifth of it at most, and not all, is replaced after the first window.
    assert [(r.update, round(r.share_replaced * 12) <= 2) for r in reselector.history] == [(2, True)]
    assert second.count == 12


def test_a_trainer_selects_and_reselects(tmp_path):
    model = get_peft_model(
        make_bert(dropout=0.0),
        SpielAGConfig(
            density=0.05, initial_support="fisher", selection_batches=2, nomination_updates=1, estimation_steps=2
        ),
    )
    SparseTrainer(model=model, args=make_args(tmp_path, max_steps=4), train_dataset=Labelled()).train()
    (reselector,) = iter_reselectors(model)
    assert [r.update for r in reselector.history] == [2]
    assert 0 < reselector.history[0].share_replaced <= 0.1
    assert sum(delta.count for *_, delta in iter_deltas(model)) == sum(model.peft_config["default"].counts.values()) > 0


@pytest.mark.parametrize("value", ["largest_weight", "gradients", 3])
def test_unknown_supports_are_refused(value):
    with pytest.raises(ConfigError, match="initial_support must be"):
        SpielAGConfig(density=0.1, initial_support=value)

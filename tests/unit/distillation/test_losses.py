"""Each loss against loops in float64, padding and causality included."""

from __future__ import annotations

import math

import pytest
import torch

from peft_sparse import ConfigError
from peft_sparse.distillation import DistillationLoss
from peft_sparse.distillation.losses import (
    attention_loss,
    hidden_loss,
    loss_named,
    pair_mask,
    prediction_loss,
    prediction_mask,
)

MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]])


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def is_pair(b: int, q: int, k: int, causal: bool, window: int | None) -> bool:
    seen = (not causal or k <= q) and (window is None or abs(q - k) < window)
    return bool(MASK[b, q] and MASK[b, k]) and seen


@pytest.mark.parametrize(("causal", "window"), [(False, None), (False, 2), (True, None), (True, 2)])
def test_attention(causal, window):
    own = [rand(3, 2, 4, 4), rand(3, 2, 4, 4).sin()]
    target = [rand(3, 2, 4, 4).cos(), rand(3, 2, 4, 4) + 1]
    total = 0.0
    for one, other in zip(own, target, strict=True):
        squares = [
            (one[b, h, q, k].item() - other[b, h, q, k].item()) ** 2
            for b in range(3) for h in range(2) for q in range(4) for k in range(4)
            if is_pair(b, q, k, causal, window)
        ]  # fmt: skip
        total += sum(squares) / len(squares) / 2
    mask = pair_mask(MASK, causal=causal, window=window)
    assert attention_loss(own, target, [mask, mask]).item() == pytest.approx(total, rel=1e-12)


def test_hidden_states():
    own, target = [rand(3, 4, 5), rand(3, 4, 5).sin()], [rand(3, 4, 5).cos(), rand(3, 4, 5) * 2]
    total = 0.0
    for one, other in zip(own, target, strict=True):
        squares = [
            (one[b, t, d].item() - other[b, t, d].item()) ** 2
            for b in range(3) for t in range(4) for d in range(5) if MASK[b, t]
        ]  # fmt: skip
        total += sum(squares) / len(squares) / 2
    assert hidden_loss(own, target, MASK).item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_predictions(temperature):
    own, target = rand(3, 4, 6), rand(3, 4, 6).sin() * 3
    losses = []
    for b in range(3):
        for t in range(4):
            if MASK[b, t]:
                weights = [math.exp(value / temperature) for value in target[b, t].tolist()]
                scores = [value / temperature for value in own[b, t].tolist()]
                total = math.log(sum(map(math.exp, scores)))
                losses.append(-sum(w / sum(weights) * (s - total) for w, s in zip(weights, scores, strict=True)))
    found = prediction_loss(own, target, MASK, temperature=temperature)
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_are_widened_before_they_are_compared(dtype):
    own, target = rand(3, 4, 5, dtype=dtype), rand(3, 4, 5).cos().to(dtype)
    expected = hidden_loss([own.double()], [target.double()], MASK)
    found = hidden_loss([own], [target], MASK)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    expected = prediction_loss(own.double(), target.double(), MASK, temperature=2)
    assert prediction_loss(own, target, MASK, temperature=2).item() == pytest.approx(expected.item(), rel=1e-6)


def test_where_predictions_count():
    labels = torch.tensor([[-100, 2, 3, -100], [1, 1, -100, 1], [0, 0, 0, 0]])
    assert prediction_mask(MASK, None, next_token=False).tolist() == MASK.bool().tolist()
    assert prediction_mask(MASK, labels, next_token=False).tolist() == [[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    # The prediction at a place is of the next token: both must be real, and the label is the next one's.
    assert prediction_mask(MASK, None, next_token=True).tolist() == [[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert prediction_mask(MASK, labels, next_token=True).tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_what_padding_holds_changes_nothing_not_even_gradients():
    own = rand(3, 4, 5).requires_grad_()
    hidden_loss([own], [torch.where(MASK.bool()[..., None], rand(3, 4, 5).cos(), 1e3)], MASK).backward()
    assert own.grad[~MASK.bool()].abs().max() == 0
    assert own.grad[MASK.bool()].abs().min() > 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"attention": -1}, "attention must be a finite number >= 0, got -1"),
        ({"hidden": float("nan")}, "hidden must be a finite number >= 0, got nan"),
        ({"temperature": 0}, "temperature must be > 0, got 0"),
        ({"attention": 0, "hidden": 0}, "got 0 for all"),
    ],
)
def test_bad_weights_are_refused_by_name(changes, match):
    with pytest.raises(ConfigError, match=match):
        DistillationLoss(**changes)


def test_losses_have_names():
    assert loss_named("teacher_forcing") == DistillationLoss(attention=1, hidden=1, prediction=1)
    assert not loss_named("self_taught").needs_teacher
    with pytest.raises(
        ConfigError, match=r"loss must be one of .* got 'teacher-forced'\. Did you mean 'teacher_forcing'"
    ):
        loss_named("teacher-forced")

from __future__ import annotations

import pytest
import torch

from peft_sparse.core.masked import MaskedPart, masked_linear, masked_weight, soft_mask


def part(scores=None, difference=None, *, initial_mask=0.9, from_identity=True):
    return MaskedPart(scores, difference, initial_mask, from_identity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("initial_mask", [1e-6, 0.1, 0.5, 0.9, 0.99, 0.999, 1 - 1e-6])
def test_a_relative_mask_is_one_at_its_start_to_the_last_bit(initial_mask, dtype):
    # Sizes with and without a remainder for the vector units.
    for size in (1, 7, 16, 1003):
        mask = soft_mask(torch.zeros(size, dtype=dtype), initial_mask, from_identity=True)
        assert torch.equal(mask, torch.ones(size, dtype=dtype))


@pytest.mark.parametrize("initial_mask", [0.1, 0.5, 0.9, 0.99])
def test_it_is_the_sigmoid(initial_mask):
    scores = torch.linspace(-30, 30, 1001, dtype=torch.float64, requires_grad=True)
    whole = (scores + torch.logit(torch.tensor(initial_mask, dtype=torch.float64))).detach()
    expected, slope = torch.sigmoid(whole), torch.sigmoid(whole) * torch.sigmoid(-whole)
    for from_identity, factor in ((False, 1.0), (True, 1 / initial_mask)):
        mask = soft_mask(scores, initial_mask, from_identity=from_identity)
        torch.testing.assert_close(mask, expected * factor, rtol=1e-13, atol=0)
        (found,) = torch.autograd.grad(mask.sum(), scores)
        torch.testing.assert_close(found, slope * factor, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_from_its_start_a_mask_is_closed_or_open_and_its_gradient_a_number(dtype):
    scores = torch.tensor([-1e30, -1e4, -88.0, 88.0, 1e4, 1e30], dtype=dtype, requires_grad=True)
    mask = soft_mask(scores, 0.9, from_identity=False)
    mask.sum().backward()
    torch.testing.assert_close(mask, torch.tensor([0, 0, 0, 1, 1, 1], dtype=dtype), rtol=1e-6, atol=1e-30)
    assert scores.grad.isfinite().all()


def test_one_adapter_is_the_formula_and_several_add_up_their_changes():
    weight, difference = torch.randn(3, 4), torch.randn(3, 4)
    scores = torch.randn(3, 4)
    mask = soft_mask(scores, 0.9, from_identity=True)
    assert torch.equal(masked_weight(weight, [part(scores)]), weight * mask)
    assert torch.equal(masked_weight(weight, [part(scores, difference)]), (weight + difference) * mask)
    assert torch.equal(masked_weight(weight, [part(None, difference)]), weight + difference)
    both = masked_weight(weight, [part(scores), part(None, difference)])
    torch.testing.assert_close(both, weight * mask + difference)


def test_a_narrow_weight_is_rounded_once():
    weight = torch.randn(50, 40).bfloat16()
    scores, difference = torch.randn(50, 40), torch.randn(50, 40)
    exact = (weight.double() + difference) * soft_mask(scores.double(), 0.9, from_identity=True)
    found = masked_weight(weight, [part(scores, difference)])
    assert found.dtype is torch.bfloat16
    assert (found != exact.bfloat16()).float().mean() < 0.01  # where float32 falls on the other side of a tie
    wide = masked_weight(weight, [part(scores, difference)], dtype=torch.float32)
    torch.testing.assert_close(wide.double(), exact, rtol=1e-5, atol=1e-6)


def test_nothing_of_the_size_of_the_weight_is_kept_for_the_backward():
    weight = torch.randn(64, 48)
    scores = torch.randn(64, 48, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        masked_linear(torch.randn(2, 3, 48, requires_grad=True), weight, None, [part(scores)])
    own = {weight.data_ptr(), scores.data_ptr()}
    assert [t.shape for t in saved if t.numel() >= weight.numel() and t.data_ptr() not in own] == []


def test_scores_changed_between_forward_and_backward_are_noticed():
    scores = torch.zeros(2, 3, requires_grad=True)
    y = masked_linear(torch.ones(1, 3), torch.ones(2, 3), None, [part(scores)])
    scores.data.add_(0)
    with torch.no_grad():
        scores.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_of_a_bfloat16_weight_are_not_rounded_to_bfloat16():
    # The product of the gradient and the input, exact in float64 for these numbers, has more bits than bfloat16 holds.
    x = torch.randn(64, 6).bfloat16()
    weight = torch.randn(5, 6).bfloat16()
    difference = torch.zeros(5, 6, requires_grad=True)
    output_grad = torch.randn(64, 5).bfloat16()
    part = MaskedPart(None, difference, 0.5, True)
    masked_linear(x, weight, None, [part]).backward(output_grad)
    torch.testing.assert_close(difference.grad, output_grad.float().t() @ x.float(), rtol=1e-5, atol=1e-5)

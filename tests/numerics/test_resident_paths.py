"""Resident mode beside the paths that add the delta densely: it must not stand in the weight twice."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_sparse import RandConfig, resident


@pytest.fixture
def tuned() -> nn.Module:
    torch.manual_seed(0)
    config = RandConfig(density=0.1, target_modules=["0"], target_biases=True, init_weights=False)
    return get_peft_model(nn.Sequential(nn.Linear(16, 12)), config)


def compile_it(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


def unfreeze_the_base(model: nn.Module) -> nn.Module:
    model.base_model.model[0].get_base_layer().weight.requires_grad_()
    return model


@pytest.mark.parametrize("change", [compile_it, unfreeze_the_base])
def test_a_dense_path_after_a_resident_forward(tuned, change):
    x = torch.randn(5, 16)
    weight = tuned.base_model.model[0].get_base_layer().weight
    pristine = weight.detach().clone()
    expected = tuned(x).detach()
    with resident(tuned):
        torch.testing.assert_close(tuned(x), expected)
        assert not torch.equal(weight, pristine)
        torch.testing.assert_close(change(tuned)(x), expected)
    assert torch.equal(weight, pristine)


@pytest.fixture
def without_biases() -> nn.Module:
    torch.manual_seed(0)
    config = RandConfig(density=0.1, target_modules=["0"], init_weights=False)
    return get_peft_model(nn.Sequential(nn.Linear(256, 128)), config).eval().requires_grad_(False)


@torch.no_grad()
def test_a_weight_whose_dtype_is_exchanged_inside(without_biases):
    weight = without_biases.base_model.model[0].get_base_layer().weight
    bias = without_biases.base_model.model[0].get_base_layer().bias
    pristine, x = weight.detach().clone(), torch.randn(5, 256)
    with resident(without_biases):
        without_biases(x)
        weight.data, bias.data = weight.data.double(), bias.data.double()
        with_delta = pristine + without_biases.base_model.model[0].get_delta_weight("default")
        expected = torch.nn.functional.linear(x.double(), with_delta.double(), bias)
        torch.testing.assert_close(without_biases(x.double()), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(weight, pristine.double())


@torch.no_grad()
def test_a_weight_whose_layout_is_exchanged_inside(without_biases):
    weight = without_biases.base_model.model[0].get_base_layer().weight
    x, contiguous = torch.randn(5, 256), weight.data
    with resident(without_biases):
        expected = without_biases(x)
        weight.data = contiguous.t().contiguous().t()
        with pytest.raises(ValueError, match="contiguous"):
            without_biases(x)
        weight.data = contiguous
        assert torch.equal(without_biases(x), expected)


@torch.no_grad()
def test_what_was_looked_up_once_is_given_up_with_the_weights_dtype_or_layout(without_biases):
    layer = without_biases.base_model.model[0]
    weight, x = layer.get_base_layer().weight, torch.randn(5, 256)
    for tensor in (weight, layer.sparse_ft_weight["default"].values):
        tensor.zero_()
    with resident(without_biases):
        without_biases(x)
        active, contiguous = layer._active, weight.data
        assert active.holds(weight, layer.active_adapter)
        assert active.is_written_in(layer._written)
        # Zeros have the same bits in every dtype.
        for exchanged in (contiguous.bfloat16(), contiguous.t().contiguous().t(), contiguous[:64]):
            weight.data = exchanged
            assert not active.holds(weight, layer.active_adapter)
        weight.data = contiguous

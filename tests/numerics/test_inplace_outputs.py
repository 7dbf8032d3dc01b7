"""Models write into the output of layers in place; torch forbids that for views that an autograd Function made."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_sparse import RandConfig

LAYERS = {
    "linear": (lambda: nn.Linear(4, 4), torch.linspace(-1, 1, 24).view(2, 3, 4)),
    "linear without bias": (lambda: nn.Linear(4, 4, bias=False), torch.linspace(-1, 1, 24).view(2, 3, 4)),
    "embedding": (lambda: nn.Embedding(5, 4), torch.tensor([[1, 2], [3, 1]])),
}


class AddsInPlace(nn.Module):
    def __init__(self, layer: nn.Module, how: str) -> None:
        super().__init__()
        self.layer, self.how = layer, how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        if self.how == "view":
            y.view(-1)[:3] *= 2
            return y
        return y.mul_(2)


@pytest.mark.parametrize("how", ["output", "view"])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_through_an_in_place_product(kind, how):
    make, x = LAYERS[kind]
    torch.manual_seed(0)
    base = make()
    model = get_peft_model(
        AddsInPlace(base, how), RandConfig(density=0.5, target_modules=["layer"], init_weights=False)
    )
    delta = model.base_model.model.layer.sparse_ft_weight["default"]
    twin = AddsInPlace(make(), how)
    twin.layer.load_state_dict(base.state_dict())
    twin.layer.weight.data += delta.delta.to_dense()
    expected, found = twin(x), model(x)
    torch.testing.assert_close(found, expected)
    coefficients = torch.randn(expected.shape)
    (expected * coefficients).sum().backward()
    (found * coefficients).sum().backward()
    torch.testing.assert_close(delta.values.grad, twin.layer.weight.grad.flatten()[delta.indices.long()])

"""A weight that the model reads once and uses several times: its gradients, through checkpoints and after writes."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_sparse import RandConfig


class SharesPositions(nn.Module):
    """Reads a table's weight and multiplies with it in two blocks, as DeBERTa does with its relative positions."""

    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.positions = nn.Embedding(6, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        table = self.positions.weight

        def block(linear: nn.Module, x: Tensor) -> Tensor:
            return x + linear((x @ table.T).softmax(-1) @ table)

        for linear in self.blocks:
            x = checkpoint(block, linear, x, use_reentrant=True) if self.checkpointed else block(linear, x)
        return x


def tuned(*, checkpointed: bool) -> nn.Module:
    torch.manual_seed(0)
    config = RandConfig(density=0.5, target_modules=["positions"], init_weights=False)
    return get_peft_model(SharesPositions(checkpointed=checkpointed).double(), config)


def values_of(model: nn.Module) -> nn.Parameter:
    return next(parameter for parameter in model.parameters() if parameter.requires_grad)


def test_reentrant_checkpoints_that_share_what_was_read():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        model = tuned(checkpointed=checkpointed)
        model(x).square().sum().backward()
        gradients.append(values_of(model).grad)
    assert gradients[0].abs().min() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6)


def test_values_written_between_forward_and_backward_are_refused():
    model = tuned(checkpointed=False)
    loss = model(torch.randn(3, 8, dtype=torch.float64)).sum()
    with torch.no_grad():
        values_of(model).add_(1.0)
    with pytest.raises(RuntimeError, match="written into between the forward and its backward"):
        loss.backward()

"""Rows of trained tokens (`trainable_token_indices`) in an output matrix that is tied to the embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..._peft_bridge import AuxiliaryTrainingWrapper, TrainableTokensLayer


class TokenRowsBesideBias(TrainableTokensLayer):
    """PEFT's layer for a linear layer with a bias, which PEFT's own leaves out (BERT's and XLM-R's masked tokens)."""

    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """[..., O] of [..., I], with the adapters' rows."""
        if self.disable_adapters or not active_adapters or self.merged:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        self._check_overlapping_tokens(active_adapters)
        return F.linear(x, self.get_merged_weights(active_adapters), self.base_layer.bias)


def keep_biases(model: nn.Module) -> None:
    """Let the biases of output matrices act beside rows of trained tokens."""
    for module in model.modules():
        layer = getattr(module, "token_adapter", None) if isinstance(module, AuxiliaryTrainingWrapper) else None
        if type(layer) is not TrainableTokensLayer:
            continue
        base = layer.base_layer
        if isinstance(base, nn.Linear) and base.bias is not None:
            layer.__class__ = TokenRowsBesideBias

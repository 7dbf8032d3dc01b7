"""Rows of trained tokens (`trainable_token_indices`): where they may be, their dtype, and tied output matrices."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn import functional as F

from ..._peft_bridge import AuxiliaryTrainingWrapper, BaseTunerLayer, TrainableTokensLayer
from ...core.names import is_trained_whole, unwrapped
from ...errors import ConfigError, FormatError
from .base_model import modules_around_adapters


def check_token_rows(config: PeftConfig, model: nn.Module, tuned: Collection[str]) -> None:
    """Refuse rows of trained tokens in a module that is tuned, or trained whole, before the model is touched.

    Args:
        config: of a new adapter.
        model: the base model, still without it.
        tuned: paths of the modules that it is going to tune.

    Raises:
        ConfigError: there are such rows.
        FormatError: the adapter's file lacks rows that its config names.
    """
    rows = getattr(config, "trainable_token_indices", None)
    if rows is None:
        return
    modules = list(modules_around_adapters(model))
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    own = {path for path, module in modules if embeddings is not None and module is embeddings}
    ends = tuple(rows) if isinstance(rows, dict) else tuple(own or ("embed_tokens",))
    found = {path: module for path, module in modules if is_trained_whole(path, ends)}
    _check_file(config, found)
    if own & found.keys() and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        output = model.get_output_embeddings()
        found.update({path: module for path, module in modules if output is not None and module is output})
    heads = tuple(getattr(config, "modules_to_save", None) or ())
    for path, module in found.items():
        if unwrapped(path) in tuned or isinstance(module, BaseTunerLayer):
            also, way_out = "an adapter tunes", f"Leave it out there with exclude_modules=[{unwrapped(path)!r}]"
        elif is_trained_whole(path, heads):
            also, way_out = f"modules_to_save={list(heads)} trains whole", "Leave one of the two out"
        else:
            continue
        raise ConfigError(
            f"trainable_token_indices trains rows of {unwrapped(path)}, which {also}: a matrix can be tuned, "
            f"trained whole or trained in some rows, and only one of these. {way_out}."
        )


def _check_file(config: PeftConfig, paths: Iterable[str]) -> None:
    """Refuse an adapter that is loaded, if its file lacks rows: PEFT would stop halfway.

    Raises:
        FormatError: it does.
    """
    held = getattr(config, "held_in_file", None)
    for path in paths:
        key = f"{unwrapped(path)}.token_adapter.trainable_tokens_delta"
        if held is not None and key not in held:
            raise FormatError(
                f"the adapter's file has no '{key}', the rows of tokens that its config says are trained "
                "(trainable_token_indices). Nothing was loaded. Save it again from the model that trained it, or set "
                "the field to null in adapter_config.json if it was trained without them."
            )


class TokenRowsBesideBias(TrainableTokensLayer):
    """PEFT's layer for a linear layer with a bias, which PEFT's own leaves out (BERT's and XLM-R's masked tokens)."""

    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """[..., O] of [..., I], with the adapters' rows."""
        if self.disable_adapters or not active_adapters or self.merged:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        self._check_overlapping_tokens(active_adapters)
        return F.linear(x, self.get_merged_weights(active_adapters), self.base_layer.bias)


def widen_rows(model: nn.Module, adapter_name: str) -> None:
    """Hold an adapter's rows in float32, as PEFT does with its own tuners': bfloat16 rounds small updates away."""
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and adapter_name in module.trainable_tokens_delta:
            rows = module.trainable_tokens_delta[adapter_name]
            rows.data = rows.data.to(torch.promote_types(rows.dtype, torch.float32))


def keep_biases(model: nn.Module) -> None:
    """Let the biases of output matrices act beside rows of trained tokens."""
    for module in model.modules():
        layer = getattr(module, "token_adapter", None) if isinstance(module, AuxiliaryTrainingWrapper) else None
        if type(layer) is not TrainableTokensLayer:
            continue
        base = layer.base_layer
        if isinstance(base, nn.Linear) and base.bias is not None:
            layer.__class__ = TokenRowsBesideBias

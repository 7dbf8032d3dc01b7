"""The attention maps of some layers, caught as a model computes them; those of the others are never kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..errors import ConfigError
from .student import stack_of

EAGER = "eager"


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside of adapters.

    Raises:
        ConfigError: there is none.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise ConfigError(f"the model must be one of transformers or a PeftModel of one, got {type(model).__name__}.")
    return inner


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether any layer's activations are computed again in the backward pass."""
    # Its name from transformers 5.24 on, which warns of the older one.
    name = "is_activation_checkpointing"
    return getattr(model, name) if hasattr(model, name) else model.is_gradient_checkpointing


def use_eager_attention(model: nn.Module) -> None:
    """Let a model compute attention in the one way that gives its probabilities.

    Raises:
        ConfigError: it cannot.
    """
    inner = inner_model(model)
    if inner.config._attn_implementation != EAGER:
        try:
            inner.set_attn_implementation(EAGER)
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{type(inner).__name__} cannot use eager attention ({error}): attention=0.") from error


def is_causal(model: nn.Module) -> bool:
    """Whether tokens see only those before them."""
    inner = inner_model(model)
    found = [vars(module).get("is_causal") for module in inner.modules() if _is_attention(module)]
    if any(one is not None for one in found):
        return any(one is True for one in found)
    # BLOOM, MPT, XGLM and others do not say it in their layers.
    config = inner.config.get_text_config()
    is_decoder_alone = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return bool(getattr(config, "is_decoder", False)) or (
        is_decoder_alone and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__


def _window_of(attention: nn.Module) -> int | None:
    """How far a query sees, itself included: the layer's own; of Mistral's kind, the config's in all layers."""
    held = vars(attention)
    window = held.get("sliding_window")
    if "sliding_window" not in held and getattr(held.get("config"), "layer_types", None) is None:
        window = getattr(held.get("config"), "sliding_window", None)
    return window if isinstance(window, int) else None


class Hooked:
    """Base class of what watches a model by hooks while a `with` block lasts: they go with the block."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()


class AttentionMaps(Hooked):
    """Keeps the attention probabilities of some layers while a `with` block lasts.

    Args:
        model: a model of transformers, maybe with adapters, that uses eager attention.
        layers: indices of the layers.

    Attributes:
        windows: {layer: how far its attention reaches back; None for everywhere}.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        super().__init__()
        self._model = inner_model(model)
        self._layers = list(layers)
        self._found: dict[int, Tensor] = {}
        self.windows: dict[int, int | None] = {}

    def __enter__(self) -> AttentionMaps:
        if not self._layers:
            return self
        stack = self._model.get_submodule(stack_of(self._model)[0])
        for index in self._layers:
            for module in stack[index].modules():
                if _is_attention(module):
                    self._handles.append(module.register_forward_hook(partial(self._keep, index)))
                    window = _window_of(module)
                    self.windows[index] = window if window is not None else self.windows.get(index)
        return self

    def _keep(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        found = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(found, Tensor) and found.dim() == 4:
            self._found.setdefault(index, found)

    def maps(self) -> list[Tensor]:
        """[B, H, T, T] of each layer.

        Raises:
            ConfigError: there are none: a model that does not give them.
        """
        missing = [index for index in self._layers if index not in self._found]
        if missing:
            name, how = type(self._model).__name__, self._model.config._attn_implementation
            raise ConfigError(
                f"{name} gave no attention probabilities in the layers {missing} (attention: {how}). Only eager "
                "attention gives them: model.set_attn_implementation('eager'), or distil without: attention=0."
            )
        return [self._found[index] for index in self._layers]

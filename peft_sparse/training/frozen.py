"""Models of which nothing would train, as one is whose adapter was loaded to be used."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ConfigError
from ..tuners.common.adapter_config import carriers_of

_WAY_OUT = (
    "Load it with is_trainable=True (PeftModel.from_pretrained(model, path, is_trainable=True)), or let it train by "
    "model.set_adapter(name)."
)


def refuse_frozen(model: nn.Module, optimizer: Any = None) -> None:
    """Refuse a training run before it begins, and so before a first phase, where no parameter requires a gradient.

    Args:
        model: what is about to be trained.
        optimizer: one that the user made, which may hold what is in no model.

    Raises:
        ConfigError: none does. torch would say so only in the first backward pass, and not why.
    """
    if optimizer is not None or any(parameter.requires_grad for parameter in model.parameters()):
        return
    configs = [name for carrier in carriers_of(model) for name in carrier.peft_config]
    if not configs:
        raise ConfigError(
            f"nothing of this {type(model).__name__} would train: it has no adapter, and none of its parameters "
            "requires a gradient. Add an adapter: get_peft_model(model, config)."
        )
    raise ConfigError(
        f"nothing would train: of the adapters {configs} and the base model no parameter requires a gradient, as "
        f"after loading an adapter to use it. {_WAY_OUT}"
    )


def frozen_adapter(adapter_name: str) -> ConfigError:
    """The error for selecting the weights of a frozen adapter, which would not train them afterwards."""
    return ConfigError(
        f"adapter {adapter_name!r} is frozen, so the weights that are selected now would not train. {_WAY_OUT}"
    )

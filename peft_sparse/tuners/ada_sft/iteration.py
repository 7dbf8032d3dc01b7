"""Walking over the masks of a model, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..common.adapter_config import refusing_unknown
from ..common.base_model import iter_tuned
from .layer import Linear
from .masked_weight import MaskedWeight


def iter_masked(model: nn.Module, adapter_name: str = "default") -> Iterator[tuple[str, Linear, MaskedWeight]]:
    """(name of the parameter in the base model, its layer, what the adapter holds on it) of every masked weight.

    Raises:
        ConfigError: the model has adapters, and none of this name.
    """
    found = (
        (f"{name}.weight", layer, masked)
        for name, layer in iter_tuned(model, Linear)
        for masked in layer.masked([adapter_name])
    )
    return refusing_unknown(found, model, adapter_name)

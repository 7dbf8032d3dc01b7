"""Walking over the deltas of a model, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..common.adapter_config import refusing_unknown
from ..common.base_model import iter_tuned
from .layers.base import PARAMETERS, SparseLayer
from .layers.delta import AdapterDelta


def iter_layers(model: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """(path in the base model, layer) of every layer that carries deltas."""
    return iter_tuned(model, SparseLayer)


def iter_deltas(
    model: nn.Module, adapter_name: str = "default"
) -> Iterator[tuple[str, SparseLayer, str, AdapterDelta]]:
    """Every tensor that an adapter tunes.

    Args:
        model: a PeftModel, a tuner, or any model with sparse layers in it.
        adapter_name: the adapter.

    Yields:
        (name of the parameter in the base model, its layer, "weight" or "bias", the delta).

    Raises:
        ConfigError: the model has adapters, and none of this name.
    """
    found = (
        (f"{name}.{parameter}", layer, parameter, layer.deltas_of(parameter)[adapter_name])
        for name, layer in iter_layers(model)
        for parameter in PARAMETERS
        if adapter_name in layer._modules[f"sparse_ft_{parameter}"]
    )
    return refusing_unknown(found, model, adapter_name)

"""Walking over the deltas of a model, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Iterator

from peft import PeftModel
from torch import nn

from ..._peft_bridge import BaseTuner
from ...core.names import unwrapped as path_in_base
from ..common.keys import modules_around_adapters
from .layers.base import PARAMETERS, SparseLayer
from .layers.delta import AdapterDelta


def base_model_of(model: nn.Module) -> nn.Module:
    """The base model inside a PeftModel, a tuner or a distributed wrapper; the model itself if it is none of these."""
    while True:
        if isinstance(model, PeftModel):
            model = model.base_model
        elif isinstance(model, BaseTuner):
            model = model.model
        elif _is_wrapper(model):
            model = model.module
        else:
            return model


def _is_wrapper(model: nn.Module) -> bool:
    """Whether a model stands around another one: DDP, or an engine that hands on the attributes of what is inside."""
    inside = getattr(model, "module", None)
    return isinstance(inside, (PeftModel, BaseTuner)) or (
        isinstance(inside, nn.Module) and not hasattr(model, "config")
    )


def iter_layers(model: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """(path in the base model, layer) of every layer that carries deltas."""
    for name, module in modules_around_adapters(base_model_of(model)):
        if isinstance(module, SparseLayer):
            yield path_in_base(name), module


def iter_deltas(
    model: nn.Module, adapter_name: str = "default"
) -> Iterator[tuple[str, SparseLayer, str, AdapterDelta]]:
    """Every tensor that an adapter tunes.

    Args:
        model: a PeftModel, a tuner, or any model with sparse layers in it.
        adapter_name: the adapter.

    Yields:
        (name of the parameter in the base model, its layer, "weight" or "bias", the delta).
    """
    for name, layer in iter_layers(model):
        for parameter in PARAMETERS:
            if adapter_name in layer._modules[f"sparse_ft_{parameter}"]:
                yield f"{name}.{parameter}", layer, parameter, layer.deltas_of(parameter)[adapter_name]

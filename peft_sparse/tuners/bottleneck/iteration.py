"""Walking over the adapters of a model, and setting them from tensors, such as a hypernetwork generates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ...errors import ConfigError
from ..common.adapter_config import refusing_unknown
from ..common.base_model import iter_tuned
from .adapter import Bottleneck, BottleneckWeights
from .layer import BottleneckLayer


def iter_layers(model: nn.Module) -> Iterator[tuple[str, BottleneckLayer]]:
    """(path in the base model, layer) of every site where adapters may lie."""
    return iter_tuned(model, BottleneckLayer)


def iter_bottlenecks(model: nn.Module, adapter_name: str = "default") -> Iterator[tuple[str, Bottleneck]]:
    """(path of its site in the base model, module) of every bottleneck of an adapter, in the order of the model.

    Invertible adapters are not among them.

    Raises:
        ConfigError: the model has adapters, and none of this name.
    """
    found = (
        (name, layer.adapters[adapter_name])
        for name, layer in iter_layers(model)
        if adapter_name in layer.adapters and isinstance(layer.adapters[adapter_name], Bottleneck)
    )
    return refusing_unknown(found, model, adapter_name)


def bottleneck_weights(model: nn.Module, adapter_name: str = "default") -> dict[str, BottleneckWeights]:
    """{path of the site: the adapter's own parameters there}."""
    return {name: module.weights for name, module in iter_bottlenecks(model, adapter_name)}


def set_bottleneck_weights(
    model: nn.Module, weights: Mapping[str, BottleneckWeights], adapter_name: str = "default"
) -> None:
    """Copy tensors into the parameters of an adapter.

    Args:
        model: whatever carries the adapter.
        weights: {path of the site: tensors}, for exactly the sites that the adapter has.
        adapter_name: the adapter.

    Raises:
        ConfigError: a site is missing, unknown, or of another shape. Nothing is changed then.
    """
    modules = _checked(model, weights, adapter_name)
    before = {name: BottleneckWeights(*(w.detach().clone() for w in m.weights)) for name, m in modules.items()}
    try:
        for name, module in modules.items():
            module.set_weights(weights[name])
    except ConfigError:
        for name, module in modules.items():
            module.set_weights(before[name])
        raise


@contextmanager
def generated_weights(
    model: nn.Module, weights: Mapping[str, BottleneckWeights], adapter_name: str = "default"
) -> Iterator[None]:
    """Inside the context an adapter computes with these tensors instead of its own parameters.

    They may carry gradients, and may have a leading dimension for the examples of a batch.

    Args:
        model, weights, adapter_name: as for `set_bottleneck_weights`.
    """
    modules = _checked(model, weights, adapter_name)
    before = {name: module.generated for name, module in modules.items()}
    for name, module in modules.items():
        module.generated = weights[name]
    try:
        yield
    finally:
        for name, module in modules.items():
            module.generated = before[name]


def _checked(model: nn.Module, weights: Mapping[str, BottleneckWeights], adapter_name: str) -> dict[str, Bottleneck]:
    modules = dict(iter_bottlenecks(model, adapter_name))
    if modules.keys() != weights.keys():
        raise ConfigError(
            f"weights must be given for exactly the sites of adapter {adapter_name!r}: "
            f"missing {sorted(modules.keys() - weights.keys())}, unknown {sorted(weights.keys() - modules.keys())}."
        )
    return modules

"""add_weighted_adapter: the mean of adapters of equal shape, as a new one."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import ConfigError
from ..common.combining import check_names, choose_head, copy_heads
from .weights import iter_layers

if TYPE_CHECKING:
    from .model import BottleneckModel

# The fields in which averaged adapters must agree: with any other value the same weights mean another function.
_SAME = ("kind", "activation", "scaling", "invertible", "placement", "target_modules", "invertible_module")


def add_weighted_adapter(
    tuner: BottleneckModel,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    *,
    head_from: str | None = None,
) -> None:
    """Average the parameters of adapters into a new one, which is not activated.

    Args:
        tuner: the model that holds them.
        adapters: their names.
        weights: one factor per adapter; they are divided by their sum, so that equal adapters give the same adapter.
        adapter_name: name of the new one.
        head_from: the adapter whose heads (`modules_to_save`) the new one gets; the only one that has any if None.

    Raises:
        ConfigError: a name is unknown or taken, the weights add up to zero, or the adapters differ in shape or kind.
    """
    check_names(tuner, adapters, weights, adapter_name)
    head = choose_head(tuner, adapters, head_from)
    total = math.fsum(weights)
    if not math.isfinite(total) or abs(total) < 1e-12:
        raise ConfigError(
            f"weights must have a finite sum other than zero, got {weights}: the new adapter is the mean under them."
        )
    configs = [tuner.peft_config[name] for name in adapters]
    for field in _SAME:
        values = [getattr(config, field) for config in configs]
        if any(value != values[0] for value in values):
            raise ConfigError(
                f"only adapters with the same {field} can be averaged, got "
                f"{', '.join(f'{name}: {value!r}' for name, value in zip(adapters, values, strict=True))}."
            )
    states = [_state(tuner, name) for name in adapters]
    _check_shapes(adapters, states)
    shares = [weight / total for weight in weights]
    config = copy.deepcopy(configs[0])
    source = tuner.peft_config[head] if head else None
    config.modules_to_save = source.modules_to_save if source else None
    config.task_type = source.task_type if source else configs[0].task_type
    tuner.peft_config[adapter_name] = config
    tuner.inject_adapter(tuner.model, adapter_name)
    with torch.no_grad():
        for key, parameter in _state(tuner, adapter_name).items():
            parts = [share * state[key].double() for share, state in zip(shares, states, strict=True)]
            parameter.copy_(torch.stack(parts).sum(0))
    if head:
        copy_heads(tuner, head, adapter_name)
    tuner.set_requires_grad(adapter_name, requires_grad=False)


def _state(tuner: BottleneckModel, adapter_name: str) -> dict[str, Tensor]:
    """{path: parameter} of an adapter."""
    found = {}
    for name, layer in iter_layers(tuner):
        if adapter_name in layer.bottleneck_adapters:
            for key, parameter in layer.bottleneck_adapters[adapter_name].named_parameters():
                found[f"{name}.{key}"] = parameter
    return found


def _check_shapes(adapters: list[str], states: list[dict[str, Tensor]]) -> None:
    shapes = [{key: tuple(parameter.shape) for key, parameter in state.items()} for state in states]
    for name, other in zip(adapters[1:], shapes[1:], strict=True):
        differing = sorted(key for key in {*shapes[0], *other} if shapes[0].get(key) != other.get(key))
        if differing:
            key = differing[0]
            raise ConfigError(
                f"only adapters of equal shape can be averaged: {adapters[0]!r} and {name!r} differ at {key} "
                f"({shapes[0].get(key)} and {other.get(key)})."
            )

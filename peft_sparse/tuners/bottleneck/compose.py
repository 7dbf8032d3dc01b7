"""The mean of bottleneck adapters: what `add_weighted_adapter` puts into a new one."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..common.combining import Combined
from .iteration import iter_layers

# The fields in which averaged adapters must agree: with any other value the same weights mean another function.
_SAME = ("kind", "activation", "scaling", "invertible", "placement", "target_modules", "invertible_module")


def combined(
    tuner: nn.Module, adapters: list[str], weights: list[float], fields: dict[str, Any], *, combination_type: str
) -> Combined:
    """The mean of the parameters of adapters of equal shape.

    Args:
        tuner: the model that holds them, with their configs.
        adapters: their names.
        weights: one factor per adapter; they are divided by their sum, so that equal adapters give the same adapter.
        fields: of the new config.
        combination_type: "linear".

    Raises:
        ConfigError: another combination type, weights that add up to zero, or adapters that differ in shape or kind.
    """
    if combination_type != "linear":
        raise ConfigError(
            f'combination_type must be "linear" for bottleneck adapters, got {combination_type!r}: '
            "their parameters are averaged."
        )
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
    vars(config).update(fields)

    def write(adapter_name: str) -> None:
        with torch.no_grad():
            for key, parameter in _state(tuner, adapter_name).items():
                parts = [share * state[key].double() for share, state in zip(shares, states, strict=True)]
                parameter.copy_(torch.stack(parts).sum(0))

    return Combined(config, write)


def _state(tuner: nn.Module, adapter_name: str) -> dict[str, Tensor]:
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

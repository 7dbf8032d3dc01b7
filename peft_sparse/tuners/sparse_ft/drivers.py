"""Drivers act on an adapter from the outside while it trains: reselection (by method) and fitted learning rates.

Both belong to training, which imports the tuners and not the other way round; so training registers here what the tuner
starts when such an adapter is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import nn

from ..common.base_model import base_models_in
from .configs.base import SparseConfig


class Driver(Protocol):
    """Something that reselects an adapter's weights while it trains, or scales their steps."""

    def stop(self) -> None:
        """Leave the adapter as it is and never touch it again."""


Maker = Callable[[nn.Module, str, SparseConfig], Driver]
# {method: (base model, adapter name, the model's copy of the config) -> its driver}
DRIVERS: dict[str, Maker] = {}
# {field of the config: what drives an adapter beside that, where the field is set}
FIELD_DRIVERS: dict[str, Maker] = {}

# Where a base model keeps its drivers: an attribute and not a global, so that both die together.
_ATTRIBUTE = "_sparse_ft_drivers"


def start(model: nn.Module, adapter_name: str, config: SparseConfig) -> None:
    """Start what drives an adapter of this config, if anything does and the adapter is there to be trained."""
    stop(model, adapter_name)
    makers = [DRIVERS[config.method]] if config.method in DRIVERS else []
    makers += [make for field, make in FIELD_DRIVERS.items() if getattr(config, field, False)]
    if makers and not config.inference_mode:
        drivers = [make(model, adapter_name, config) for make in makers]
        model.__dict__.setdefault(_ATTRIBUTE, {})[adapter_name] = drivers


def stop(model: nn.Module, adapter_name: str | None = None) -> None:
    """Stop what drives one adapter of a base model, or all of them."""
    own = model.__dict__.get(_ATTRIBUTE, {})
    for name in list(own) if adapter_name is None else [adapter_name]:
        for driver in own.pop(name, ()):
            driver.stop()
    if not own:
        model.__dict__.pop(_ATTRIBUTE, None)


def iter_drivers(model: nn.Module) -> Iterator[Driver]:
    """The drivers of a model's adapters, whatever it is wrapped in, and of those of all of its parts."""
    for base in base_models_in(model):
        for drivers in list(base.__dict__.get(_ATTRIBUTE, {}).values()):
            yield from drivers

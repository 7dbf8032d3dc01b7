"""What drives an adapter whose support changes while it trains, from the outside: a registry by method.

Reselection belongs to training, which imports the tuners and not the other way round; so training registers here what
the tuner starts when such an adapter is added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import nn

from .configs.base import SparseConfig


class Driver(Protocol):
    """Something that reselects an adapter's weights while it trains."""

    def stop(self) -> None:
        """Leave the adapter as it stands and never touch it again."""


# {method: (base model, adapter name, the model's copy of the config) -> its driver}
DRIVERS: dict[str, Callable[[nn.Module, str, SparseConfig], Driver]] = {}


# Where a base model keeps its drivers: an attribute and not a global, so that both die together.
_ATTRIBUTE = "_sparse_ft_drivers"


def start(model: nn.Module, adapter_name: str, config: SparseConfig) -> None:
    """Start what drives an adapter of this method, if anything does and the adapter is there to be trained."""
    stop(model, adapter_name)
    make = DRIVERS.get(config.method)
    if make is not None and not config.inference_mode:
        drivers_of(model)[adapter_name] = make(model, adapter_name, config)


def stop(model: nn.Module, adapter_name: str | None = None) -> None:
    """Stop what drives one adapter of a base model, or all of them."""
    own = model.__dict__.get(_ATTRIBUTE, {})
    for name in list(own) if adapter_name is None else [adapter_name]:
        driver = own.pop(name, None)
        if driver is not None:
            driver.stop()
    if not own:
        model.__dict__.pop(_ATTRIBUTE, None)


def drivers_of(model: nn.Module) -> dict[str, Driver]:
    """{adapter name: its driver} of a base model."""
    return model.__dict__.setdefault(_ATTRIBUTE, {})

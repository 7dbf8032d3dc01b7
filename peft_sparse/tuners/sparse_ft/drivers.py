"""Drivers act on an adapter from the outside while it trains: reselection (by method) and fitted learning rates.

Both belong to training, which imports the tuners and not the other way round; so training registers here what the tuner
starts when such an adapter is added.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping

from torch import nn

from ..common.base_model import base_models_in
from ..common.events import ON_START, announce
from .configs.base import SparseConfig
from .layers.delta import AdapterDelta


class Driver(ABC):
    """Something that reselects an adapter's weights while it trains, or scales their steps.

    That of an adapter which was loaded to be used sleeps until any of its values are let train, by whatever verb or by
    hand: it does nothing, and whoever looks for drivers does not find it.

    Attributes:
        adapter_name: the adapter.
        deltas: {parameter name: delta} of those that it acts on.
    """

    adapter_name: str
    deltas: Mapping[str, AdapterDelta]
    _sleeps = False

    @property
    def is_asleep(self) -> bool:
        """Whether it sleeps still. To be asked where training begins or goes on: it stays awake once it is found so."""
        if self._sleeps and any(delta.held_values.requires_grad for delta in self.deltas.values()):
            self._sleeps = False
        return self._sleeps

    def sleep(self) -> None:
        """Sleep until the adapter trains, of which its layers tell trainers."""
        self._sleeps = True
        for delta in self.deltas.values():
            delta.wakes_driver = True

    @abstractmethod
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
    """Start what drives an adapter of this config, if anything does; asleep where it is there to be used."""
    stop(model, adapter_name)
    makers = [DRIVERS[config.method]] if config.method in DRIVERS else []
    makers += [make for field, make in FIELD_DRIVERS.items() if getattr(config, field, False)]
    if not makers:
        return
    drivers = [make(model, adapter_name, config) for make in makers]
    model.__dict__.setdefault(_ATTRIBUTE, {})[adapter_name] = drivers
    if config.inference_mode:
        for driver in drivers:
            driver.sleep()
    # Trainers are slow to import, so one that is loaded to be used tells only those that may be there by now.
    if not config.inference_mode or "transformers.trainer" in sys.modules:
        announce(ON_START)


def stop(model: nn.Module, adapter_name: str | None = None) -> None:
    """Stop what drives one adapter of a base model, or all of them."""
    own = model.__dict__.get(_ATTRIBUTE, {})
    for name in list(own) if adapter_name is None else [adapter_name]:
        for driver in own.pop(name, ()):
            driver.stop()
    if not own:
        model.__dict__.pop(_ATTRIBUTE, None)


def iter_drivers(model: nn.Module) -> Iterator[Driver]:
    """The drivers of a model's adapters, whatever it is wrapped in, and of those of all of its parts.

    Those that sleep are left out.
    """
    for base in base_models_in(model):
        for drivers in list(base.__dict__.get(_ATTRIBUTE, {}).values()):
            yield from (driver for driver in drivers if not driver.is_asleep)

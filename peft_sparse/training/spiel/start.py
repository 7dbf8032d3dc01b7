"""What starts when a SpIEL adapter is added: its reselector, and a callback in the trainers that are built later."""

from __future__ import annotations

from torch import nn

from ...tuners.common.events import ON_START, announce
from ...tuners.sparse_ft.configs.spiel import SpielConfig
from ...tuners.sparse_ft.drivers import DRIVERS
from ..callbacks import add_to_every_trainer
from .reselector import Reselector


def start_reselector(model: nn.Module, adapter_name: str, config: SpielConfig) -> Reselector:
    """The driver of a SpIEL adapter, told to trainers; see `Reselector`."""
    reselector = Reselector(model, adapter_name, config)
    announce(ON_START)
    return reselector


def tell_trainers() -> None:
    """Let every trainer that is built from now on know of reselecting adapters, and of fitted rates."""
    # Here and not above: it imports transformers' trainer, which is slow.
    from .callback import ReselectionCallback

    add_to_every_trainer(ReselectionCallback)


DRIVERS["spiel_ag"] = start_reselector
DRIVERS["spiel_ma"] = start_reselector
ON_START.append(tell_trainers)

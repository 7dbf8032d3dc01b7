"""What starts when a SpIEL adapter is added: its reselector, and a callback in the trainers that are built later."""

from __future__ import annotations

from ...tuners.common.events import ON_START
from ...tuners.sparse_ft.drivers import DRIVERS
from ..callbacks import add_to_every_trainer
from .reselector import Reselector


def tell_trainers() -> None:
    """Let every trainer that is built from now on know of reselecting adapters, and of fitted rates."""
    # Here and not above: it imports transformers' trainer, which is slow.
    from .callback import ReselectionCallback

    add_to_every_trainer(ReselectionCallback)


DRIVERS["spiel_ag"] = Reselector
DRIVERS["spiel_ma"] = Reselector
ON_START.append(tell_trainers)

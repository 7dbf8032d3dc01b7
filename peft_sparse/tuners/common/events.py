"""Events of adapters that trainers have to know of: one is made, several are activated, some are merged.

Training imports the tuners and not the other way round, so it registers here the functions that are called.
"""

from __future__ import annotations

from collections.abc import Callable

# Called when an adapter is made that has a first phase before it.
ON_UNFINISHED: list[Callable[[], None]] = []
# Called when an adapter is made, or copied, whose support changes while it trains, or whose steps are scaled.
ON_START: list[Callable[[], None]] = []
# Called when several adapters are made active, and not all of them are there to be used only.
ON_STACK: list[Callable[[], None]] = []
# Called when adapters are merged that are there to be trained.
ON_MERGE: list[Callable[[], None]] = []
# Called when an adapter is made, to be trained, that is undone before the output matrix.
ON_INVERTIBLE: list[Callable[[], None]] = []


def announce(listeners: list[Callable[[], None]]) -> None:
    """Call all that are to be told of one of these events."""
    for tell in listeners:
        tell()

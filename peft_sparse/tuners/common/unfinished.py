"""Who is told of adapters that have a first phase before them."""

from __future__ import annotations

from collections.abc import Callable

# Called when an adapter is made that has a first phase before it. Training, which imports the tuners and not the other
# way round, registers here how it tells the trainers that know no phases.
ON_UNFINISHED: list[Callable[[], None]] = []


def announce() -> None:
    """Say that there is an adapter which has a first phase before it."""
    for tell in ON_UNFINISHED:
        tell()

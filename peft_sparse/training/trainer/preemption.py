"""SIGTERM under transformers' just-in-time checkpoints (`enable_jit_checkpoint`), in a run of several phases."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# transformers keeps this file in a just-in-time checkpoint while it writes it.
SENTINEL = "checkpoint-is-incomplete.txt"


@contextmanager
def listening(trainer: Any) -> Iterator[None]:
    """Hear SIGTERM for the length of the block, so also between two phases and while weights are selected.

    A trainer puts the former handler back at the end of each training run, and so of each phase; see `listen`.
    """
    listen(trainer)
    try:
        yield
    finally:
        for manager in _managers(trainer):
            if _hears(manager) and manager._original_sigterm_handler is not None:
                signal.signal(signal.SIGTERM, manager._original_sigterm_handler)


def listen(trainer: Any) -> None:
    """Hear SIGTERM again; nothing if the trainer hears it already, or writes no just-in-time checkpoints."""
    for manager in _managers(trainer):
        if not _hears(manager):
            manager.setup_signal_handler()


def take_request(trainer: Any) -> bool:
    """Whether SIGTERM asks for a checkpoint now. The request is taken: nobody else answers it."""
    requested = [manager for manager in _managers(trainer) if manager.is_checkpoint_requested]
    for manager in requested:
        manager.is_checkpoint_requested = False
    return bool(requested)


def is_just_in_time(folder: str) -> bool:
    """Whether the checkpoint that is about to be written in `folder` answers a SIGTERM."""
    return os.path.exists(os.path.join(folder, SENTINEL))


def _managers(trainer: Any) -> list[Any]:
    found = (getattr(callback, "jit_manager", None) for callback in trainer.callback_handler.callbacks)
    return [manager for manager in found if manager is not None]


def _hears(manager: Any) -> bool:
    return signal.getsignal(signal.SIGTERM) == manager._sigterm_handler

"""Being told of every optimizer update, in a loop that knows nothing of it."""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakSet

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class Stepped(Protocol):
    """Something whose parameters an optimizer may hold."""

    def is_stepped_by(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer has just made an update of them."""

    def after_step(self, optimizer: Optimizer) -> None:
        """The update was made; the gradients that it saw are still there."""


# Weak: whoever owns what is watched takes it along.
_watched: WeakSet[Any] = WeakSet()
_hook: Any = None


def watch(stepped: Stepped) -> None:
    """Tell `stepped` of every later update of its parameters, by whatever optimizer, until it dies or `unwatch`."""
    global _hook
    _watched.add(stepped)
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)


def unwatch(stepped: Stepped) -> None:
    """Undo `watch`."""
    global _hook
    _watched.discard(stepped)
    if _hook is not None and not len(_watched):
        _hook.remove()
        _hook = None


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for stepped in tuple(_watched):
        if stepped.is_stepped_by(optimizer):
            stepped.after_step(optimizer)

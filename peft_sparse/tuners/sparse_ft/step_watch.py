"""Being told of every optimizer step, in a loop that knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from torch.optim import Optimizer

T = TypeVar("T")


class StepWatch(Generic[T]):
    """Objects to be told of optimizer steps. They are held weakly, and torch's hook is there while there are any.

    Args:
        register: torch's `register_optimizer_step_pre_hook` or `register_optimizer_step_post_hook`.
        tell: called at each step of any optimizer, with the watched objects and that optimizer.
    """

    def __init__(
        self, register: Callable[[Callable[..., None]], Any], tell: Callable[[tuple[T, ...], Optimizer], None]
    ) -> None:
        self._register = register
        self._tell = tell
        self._watched: WeakSet[Any] = WeakSet()
        self._hook: Any = None

    def add(self, watched: T) -> None:
        """Tell `watched` of every later step, until it dies or is discarded."""
        self._watched.add(watched)
        if self._hook is None:
            self._hook = self._register(self._on_step)

    def discard(self, watched: T) -> None:
        """Undo `add`."""
        self._watched.discard(watched)
        self._leave_if_idle()

    def __len__(self) -> int:
        return len(self._watched)

    def __iter__(self) -> Iterator[T]:
        return iter(tuple(self._watched))

    @property
    def is_hooked(self) -> bool:
        """Whether torch calls at each step."""
        return self._hook is not None

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._leave_if_idle()
        self._tell(tuple(self), optimizer)

    def _leave_if_idle(self) -> None:
        if self._hook is not None and not len(self._watched):
            self._hook.remove()
            self._hook = None

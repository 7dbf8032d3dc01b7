"""Calling objects at every optimizer step, in loops that know nothing of them."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.optim import Optimizer

T = TypeVar("T")
# The watches that tell of a step right now.
_telling: list[object] = []


@dataclass(frozen=True, eq=False)
class Step:
    """One call of an optimizer's `step`, as it begins or ends.

    A call is not yet an update. Optimizers are built around others (Lookahead, SAM), and a subclass calls the `step` of
    its base class: torch's hooks see each of these calls.

    Attributes:
        optimizer: whose step it is.
        args, kwargs: of the call, the optimizer first.
        enclosing: the optimizers within whose own step it runs, innermost first.
    """

    optimizer: Optimizer
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    enclosing: tuple[Optimizer, ...]

    def parameters(self) -> Iterator[Tensor]:
        """The parameters that this very call updates, if anything does: each in exactly one of the calls around it."""
        done = {id(p) for optimizer in self.enclosing for p in _own_parameters(optimizer)}
        return (p for p in _own_parameters(self.optimizer) if id(p) not in done)

    @property
    def closure(self) -> Callable[[], Any] | None:
        """What computes the gradients within the step, if they are not there before."""
        return self.args[1] if len(self.args) > 1 else self.kwargs.get("closure")

    def with_closure(self, closure: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for the call with another closure."""
        if len(self.args) > 1:
            return (self.args[0], closure, *self.args[2:]), self.kwargs
        return self.args, {**self.kwargs, "closure": closure}


def all_parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    """Every parameter that an optimizer holds."""
    return (p for group in optimizer.param_groups for p in group["params"])


def _own_parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    """The parameters that an optimizer updates itself, and does not leave to one inside it."""
    left = {id(p) for inner in _inner_optimizers(optimizer) for p in all_parameters(inner)}
    return (p for p in all_parameters(optimizer) if id(p) not in left)


def _inner_optimizers(optimizer: Optimizer) -> Iterator[Optimizer]:
    for key, value in vars(optimizer).items():
        if key in ("state", "param_groups"):
            continue
        held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        # Without torch's mark on its `step`, no hook is told of it.
        yield from (
            inner
            for inner in held
            if isinstance(inner, Optimizer) and inner is not optimizer and hasattr(type(inner).step, "hooked")
        )


class StepWatch(Generic[T]):
    """Objects to be told of optimizer steps. They are held weakly; torch's hook goes when the last is discarded, and
    does nothing when the last has died.

    Args:
        register: torch's `register_optimizer_step_pre_hook` or `register_optimizer_step_post_hook`.
        tell: called at each step of any optimizer, with the watched objects and that step; before a step it may return
            other arguments for it.
    """

    def __init__(
        self, register: Callable[[Callable[..., Any]], Any], tell: Callable[[tuple[T, ...], Step], Any]
    ) -> None:
        self._register = register
        self._tell = tell
        # Replaced and never changed: a model may be made in one thread while another trains.
        self._watched: tuple[weakref.ref[Any], ...] = ()
        # One thread may come again: whatever is collected meanwhile may ask to be discarded.
        self._lock = threading.RLock()
        self._hook: Any = None

    def add(self, watched: T) -> None:
        """Tell `watched` of every later step, until it dies or is discarded."""
        with self._lock:
            self._watched = (*self._all_but(watched), weakref.ref(watched))
            if self._hook is None:
                self._hook = self._register(self._on_step)

    def discard(self, watched: T) -> None:
        """Undo `add`."""
        with self._lock:
            self._watched = tuple(self._all_but(watched))
            # Torch goes through its hooks while they tell, and must not lose one meanwhile: it stays, and does nothing.
            if self._hook is not None and not len(self) and not _telling:
                self._hook.remove()
                self._hook = None

    def _all_but(self, watched: T) -> Iterator[weakref.ref[Any]]:
        """Those that live, without one."""
        return (each for each in self._watched if (one := each()) is not None and one is not watched)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[T]:
        return (watched for each in self._watched if (watched := each()) is not None)

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if not len(self):
            return None
        # Every step runs in a wrapper of torch's, of one code for all optimizers. Looking for it on the stack needs no
        # memory, which a step that ends in an exception would leave wrong.
        frame: Any = sys._getframe(1)
        code, enclosing = frame.f_code, []
        while (frame := frame.f_back) is not None:
            if frame.f_code is code:
                enclosing.append(frame.f_locals["self"])
        _telling.append(self)
        try:
            return self._tell(tuple(self), Step(optimizer, args, kwargs, tuple(enclosing)))
        finally:
            _telling.remove(self)

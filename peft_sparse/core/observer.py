"""Watching the gradient of a weight that itself gets none: what a backward pass hands to observers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


class GradientObserver(Protocol):
    """Sees the gradient of one tuned tensor, at positions of its choice, in every backward pass that it is given to.

    A layer that is used several times hands over the gradient of each use separately: their sum is the tensor's.
    """

    def wanted(self) -> Tensor | None:
        """[c] flat positions, sorted and unique, at which the gradient is wanted; None for all of them."""

    def receive(self, gradient: Tensor) -> None:
        """Take the gradient of one use: [c] at the wanted positions, or the whole of it flat [numel].

        float32 or wider. It is the caller's memory: what is to stay has to be copied. Replicas of the model hand over
        theirs from a thread and a device each.
        """


# {backward pass: the pass that it runs within}. Reentrant checkpointing runs the backward pass of each of its segments
# inside the whole one, of a graph that it made there.
_outer: dict[int, int] = {}
_MOST_PASSES = 2**12


def current_pass() -> int:
    """The number of the backward pass that runs now, the outermost one; -1 outside of any."""
    found = _running()
    # Another thread may empty it.
    while (outer := _outer.get(found)) is not None:
        found = outer
    return found


def remember_outer(made_in: int) -> None:
    """Note, inside a backward pass, during which other pass its part of the graph was made (reentrant checkpointing).

    Args:
        made_in: what `current_pass` was in the forward.
    """
    own = _running()
    if made_in in (-1, own) or own in _outer:
        return
    if len(_outer) >= _MOST_PASSES:
        _outer.clear()
    _outer[own] = made_in


def is_accumulated(parameter: Tensor) -> bool:
    """Whether the backward pass that runs now adds to a parameter's `grad`, or hands its gradient to the caller.

    It does neither under `torch.autograd.grad` of something else, or `backward(inputs=...)` without the parameter.
    """
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
    except RuntimeError:
        # `torch.autograd.grad` of this very parameter, about which torch gives no answer.
        return True


def is_within_another() -> bool:
    """Whether the backward pass that runs now runs within another one."""
    return _running() in _outer


def _running() -> int:
    return torch._C._current_graph_task_id()


def wanted_on(observer: GradientObserver, device: torch.device) -> Tensor | None:
    """What an observer wants, on the device of a replica of the model (`nn.DataParallel`)."""
    wanted = observer.wanted()
    return None if wanted is None else wanted.to(device)


def watch_gradient(result: Tensor, observers: Sequence[GradientObserver]) -> None:
    """Hand the gradient of a tensor, or what is wanted of it, to observers in every backward pass."""
    if not observers or not result.requires_grad:
        return
    made_in = current_pass()
    for observer in observers:
        result.register_hook(partial(_show, observer, made_in))


def _show(observer: GradientObserver, made_in: int, gradient: Tensor) -> None:
    remember_outer(made_in)
    receive_whole(observer, gradient)


def receive_whole(observer: GradientObserver, gradient: Tensor) -> None:
    """Hand an observer what it wants of a tensor's whole gradient, of any shape and dtype."""
    wanted = wanted_on(observer, gradient.device)
    whole = gradient.detach().reshape(-1).to(torch.promote_types(gradient.dtype, torch.float32))
    observer.receive(whole if wanted is None else whole[wanted.long()])

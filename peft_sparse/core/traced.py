"""Showing tensors to Python objects from inside of what torch.compile made of a model.

A compiled graph calls no Python, so an object that wants to see a tensor has a number, and an operation that the
compiler does not look into finds the object by it. The number is a tensor and so an input of the graph: one graph
serves all layers of a kind, and all windows of a run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor

_numbers = count()
# Inside of an operation torch dispatches below autograd, where nobody can ask what a backward pass goes through.
_OUTSIDE = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
_viewers: weakref.WeakValueDictionary[int, Viewer] = weakref.WeakValueDictionary()


class Viewer:
    """Something that compiled graphs show tensors to, as long as it lives.

    Args:
        take: what is called with each tensor, outside of autograd. It is the caller's memory: what is to stay has to be
            copied.

    Attributes:
        number: [] int64 on the CPU, what `shown` and `gradient_shown` take. A copy of a viewer has its own.
    """

    def __init__(self, take: Callable[[Tensor], None]) -> None:
        self.take = take
        number = next(_numbers)
        self.number = torch.tensor(number)
        _viewers[number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return Viewer, (self.take,)


def is_traced() -> bool:
    """Whether torch.compile makes a graph that this process will run: no export, whose graph may run anywhere."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


@torch.library.custom_op("peft_sparse::shown", mutates_args=())
def shown(x: Tensor, number: Tensor) -> Tensor:
    """A copy of a tensor, of any shape and dtype, which is shown to the viewer of a number while the graph runs."""
    viewer = _viewers.get(int(number))
    if viewer is not None:
        with torch._C._ForceDispatchKeyGuard(*_OUTSIDE), torch.no_grad():
            viewer.take(x.detach())
    return x.clone()


@torch.library.custom_op("peft_sparse::gradient_shown", mutates_args=())
def gradient_shown(x: Tensor, number: Tensor) -> Tensor:
    """A copy of a tensor whose gradient is shown to the viewer of a number in every backward pass."""
    return x.clone()


def _keep_number(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _same(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return gradient, None


def _show(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    (number,) = ctx.saved_tensors
    return shown(gradient, number), None


for operation, backward in ((shown, _same), (gradient_shown, _show)):
    operation.register_fake(lambda x, number: torch.empty_like(x))
    operation.register_autograd(backward, setup_context=_keep_number)

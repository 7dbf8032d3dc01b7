"""L1: lambda/N * sum |delta|, pulling tuned weights back to their pretrained values, in any loop and under any
optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook


@dataclass(frozen=True, eq=False)
class Pull:
    """What the penalty does to one parameter.

    Attributes:
        parameter: the parameter that it pulls.
        coefficient: lambda/N.
        original: where it pulls to, shape of the parameter; None for zero.
    """

    parameter: nn.Parameter
    coefficient: float
    original: Tensor | None = None

    def difference(self) -> Tensor:
        """The parameter's distance from where it is pulled to."""
        value = self.parameter.detach()
        return value if self.original is None else value - self.original.to(value.device)

    def penalty(self) -> float:
        """lambda/N * sum |difference|, summed in float32."""
        return self.coefficient * float(self.difference().abs().sum(dtype=torch.float32))


class Pulled(Protocol):
    """Anything with penalised parameters: an adapter's delta, or a dense phase."""

    def pulls(self) -> Iterable[Pull]:
        """The penalties as they stand now."""


# Weak: an adapter that is deleted, or a model that is dropped, takes its penalty along.
_watched: WeakSet[Any] = WeakSet()
_hook: Any = None


def watch(pulled: Pulled) -> None:
    """Add the penalty of `pulled` to every later optimizer step over its parameters, until it dies or `unwatch`."""
    global _hook
    _watched.add(pulled)
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_add_gradients)


def unwatch(pulled: Pulled) -> None:
    """Undo `watch`."""
    _watched.discard(pulled)
    _remove_idle_hook()


def _remove_idle_hook() -> None:
    global _hook
    if _hook is not None and not len(_watched):
        _hook.remove()
        _hook = None


@torch.no_grad()
def _add_gradients(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Add lambda/N * sign(difference) to the gradients that `optimizer` is about to step on.

    The step, not the backward, is where this belongs: it happens once under gradient accumulation, and on every rank
    alike after the gradients were averaged. Parameters without a gradient are not stepped on, so they get none here
    either.
    """
    _remove_idle_hook()
    pulls = {id(pull.parameter): pull for pulled in tuple(_watched) for pull in pulled.pulls()}
    # A fused optimizer under a GradScaler divides the gradients by the scale within its step.
    scale = getattr(optimizer, "grad_scale", None)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            pull = pulls.get(id(parameter))
            if pull is None or parameter.grad is None:
                continue
            step = pull.difference().sign().mul_(pull.coefficient)
            parameter.grad.add_(step if scale is None else step * scale)

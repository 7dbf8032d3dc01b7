"""Scaling the steps that an optimizer makes on some parameters, in any loop and under any optimizer.

Parameter groups with learning rates of their own would do the same, and cost a kernel launch for each group and update;
they also could not follow a support that changes, for schedulers keep the rates that they began with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..core.sharded import own_part
from .step_watch import Step, StepWatch, all_parameters

# Of all entries of a parameter, or of each: [k] on its device, as this process holds it.
Scale = float | Tensor


class Scaled(Protocol):
    """Anything that scales steps: see `training.fitted_rate`."""

    def scales(self, parameters: Iterable[Tensor]) -> list[tuple[Tensor, Scale]]:
        """(parameter, how much of each step to take) of those that it scales, at the beginning of a step on them."""


# {optimizer in its step: the parameters that are scaled, what they were before, and the scales}
_before: dict[int, tuple[list[Tensor], list[Tensor], list[Scale]]] = {}


@torch.no_grad()
def _begin(watched: tuple[Scaled, ...], step: Step) -> None:
    if step.enclosing:
        return  # the outermost optimizer's step is what is scaled, once
    held = [p for p in all_parameters(step.optimizer) if p.grad is not None or step.closure is not None]
    found = [pair for scaled in watched for pair in scaled.scales(held) if not _is_one(pair[1])]
    if found:
        parameters = [own_part(parameter) for parameter, _ in found]
        _before[id(step.optimizer)] = parameters, [p.clone() for p in parameters], [scale for _, scale in found]


@torch.no_grad()
def end_step(step: Step) -> None:
    """Scale the step that was just made; nothing if that is done already.

    Whoever changes supports after a step calls this first.
    """
    if step.enclosing or (kept := _before.pop(id(step.optimizer), None)) is None:
        return
    parameters, before, scales = kept
    kinds = [(p.device, p.dtype, isinstance(scale, Tensor)) for p, scale in zip(parameters, scales, strict=True)]
    for kind in set(kinds):
        own = [i for i, found in enumerate(kinds) if found == kind]
        moved = torch._foreach_sub([parameters[i] for i in own], [before[i] for i in own])
        torch._foreach_mul_(moved, [scales[i] for i in own])  # type: ignore[misc]
        torch._foreach_add_(moved, [before[i] for i in own])
        torch._foreach_copy_([parameters[i] for i in own], moved)


def _is_one(scale: Scale) -> bool:
    return not isinstance(scale, Tensor) and scale == 1.0


class StepScales:
    """Watches for what scales steps; both hooks come and go together."""

    def __init__(self) -> None:
        self._begins: StepWatch[Scaled] = StepWatch(register_optimizer_step_pre_hook, _begin)
        self._ends: StepWatch[Scaled] = StepWatch(
            register_optimizer_step_post_hook, lambda watched, step: end_step(step)
        )

    def add(self, scaled: Scaled) -> None:
        """Ask `scaled` at every later step, until it dies or is discarded."""
        self._begins.add(scaled)
        self._ends.add(scaled)

    def discard(self, scaled: Scaled) -> None:
        """Undo `add`."""
        self._begins.discard(scaled)
        self._ends.discard(scaled)


scaled_steps = StepScales()

"""L1: lambda/N * sum |delta|, pulling tuned weights back to their pretrained values, in any loop and under any
optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import LBFGS
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..core.sharded import whole
from .step_watch import Step, StepWatch


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
        """lambda/N * sum |difference|, summed in float32; of all processes' parts, if they share the parameter."""
        return self.coefficient * float(whole(self.difference()).abs().sum(dtype=torch.float32))


class Pulled(Protocol):
    """Anything with penalised parameters: an adapter's delta, or a dense phase."""

    def pulls(self) -> Iterable[Pull]:
        """The penalties as they are now."""


def _before_step(watched: tuple[Pulled, ...], step: Step) -> Any:
    """Add lambda/N * sign(difference) to the gradients that a step is about to use.

    The step, not the backward, is where this belongs: it happens once under gradient accumulation, and on every rank
    alike after the gradients were averaged. Where a closure computes the gradients within the step, it happens after
    each call of the closure.
    """
    closure = step.closure
    if closure is None:
        _add_gradients(watched, step)
        return None
    if not any(True for _ in step.parameters()):
        return None

    def penalised_closure() -> Any:
        loss = closure()
        penalty = _add_gradients(watched, step)
        # The one optimizer that compares losses, and has to compare those that its gradients are of.
        return loss + penalty if isinstance(step.optimizer, LBFGS) else loss

    return step.with_closure(penalised_closure)


@torch.no_grad()
def _add_gradients(watched: tuple[Pulled, ...], step: Step) -> float:
    """Add the penalties' gradients; returns the penalties of L-BFGS.

    Parameters without a gradient are not stepped on, so they get none here either.
    """
    pulls = {id(pull.parameter): pull for pulled in watched for pull in pulled.pulls()}
    # A fused optimizer under a GradScaler divides the gradients by the scale within its step.
    scale = getattr(step.optimizer, "grad_scale", None)
    penalty = 0.0
    for parameter in step.parameters():
        pull = pulls.get(id(parameter))
        if pull is None or parameter.grad is None:
            continue
        if not parameter.requires_grad and not bool(whole(parameter.grad).any()):
            continue  # of an adapter whose turn it is not, set to zero instead of None
        sign = pull.difference().sign().mul_(pull.coefficient)
        parameter.grad.add_(sign if scale is None else sign * scale)
        if isinstance(step.optimizer, LBFGS):
            penalty += pull.penalty()
    return penalty


# An adapter that is deleted, or a model that is dropped, takes its penalty along.
penalised: StepWatch[Pulled] = StepWatch(register_optimizer_step_pre_hook, _before_step)

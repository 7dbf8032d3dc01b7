"""L1: lambda/N * sum |delta|, pulling tuned weights back to their pretrained values, in any loop and under any
optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ...core.sharded import whole
from .step_watch import StepWatch


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
        """The penalties as they stand now."""


@torch.no_grad()
def _add_gradients(watched: tuple[Pulled, ...], optimizer: Optimizer) -> None:
    """Add lambda/N * sign(difference) to the gradients that `optimizer` is about to step on.

    The step, not the backward, is where this belongs: it happens once under gradient accumulation, and on every rank
    alike after the gradients were averaged. Parameters without a gradient are not stepped on, so they get none here
    either.
    """
    pulls = {id(pull.parameter): pull for pulled in watched for pull in pulled.pulls()}
    # A fused optimizer under a GradScaler divides the gradients by the scale within its step.
    scale = getattr(optimizer, "grad_scale", None)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            pull = pulls.get(id(parameter))
            if pull is None or parameter.grad is None:
                continue
            step = pull.difference().sign().mul_(pull.coefficient)
            parameter.grad.add_(step if scale is None else step * scale)


# An adapter that is deleted, or a model that is dropped, takes its penalty along.
penalised: StepWatch[Pulled] = StepWatch(register_optimizer_step_pre_hook, _add_gradients)

"""What an optimizer's state starts from for a grown weight: a row for each known optimizer.

The right start depends on the optimizer: its own bias correction must turn it into the moments of a weight that has
seen the estimated gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim

from .sparse_adamw import SparseAdamW


@dataclass(frozen=True, eq=False)
class GrownGradients:
    """What is known of the gradients of grown weights.

    Attributes:
        mean: [n] mean gradient, in the order of `Replacement.grown`, as the optimizer would have seen it.
        mean_square: [n] mean of the squared gradients.
        samples: gamma >= 1, the number of updates that both are means over.
    """

    mean: Tensor
    mean_square: Tensor
    samples: int


@dataclass(frozen=True, eq=False)
class Known:
    """What an initial value may depend on."""

    gradients: GrownGradients
    group: Mapping[str, Any]
    step: float

    def beta(self, i: int) -> float:
        return float(self.group["betas"][i])


Initial = Callable[[Known], Tensor | float]


def zero(_: Known) -> float:
    """As for a new parameter."""
    return 0.0


def _mean(known: Known) -> Tensor:
    return known.gradients.mean


def _mean_square(known: Known) -> Tensor:
    return known.gradients.mean_square


def _root_mean_square(known: Known) -> Tensor:
    return known.gradients.mean_square.sqrt()


def sum_of_squares(known: Known) -> Tensor:
    """What Adagrad and its kind add up."""
    return known.gradients.mean_square * known.gradients.samples + known.group.get("initial_accumulator_value", 0.0)


# The correction of Adam divides an average after n gradients by 1 - beta**n, so a mean times that comes out of it as
# the mean. With a gradient g in the next update, beta * mean * (1 - beta**n) + (1 - beta) * g is divided by
# 1 - beta**(n + 1): for equal gradients that is g again, exactly what a weight gets that has seen n + 1 of them. So n
# is the number of gradients before the next update: gamma where each weight has its age, t where all share a count.
def _aged_mean(known: Known) -> Tensor:
    return known.gradients.mean * (1 - known.beta(0) ** known.gradients.samples)


def _aged_mean_square(known: Known) -> Tensor:
    return known.gradients.mean_square * (1 - known.beta(1) ** known.gradients.samples)


def _fast_and_slow_mean(known: Known) -> Tensor:
    """AdEMAMix stacks two means of gradients; the slow one is not corrected for its start from zero."""
    fast = _shared_mean(known)
    return torch.stack([fast, torch.zeros_like(fast)])


def _age(known: Known) -> float:
    return float(known.gradients.samples)


def _shared_mean(known: Known) -> Tensor:
    return known.gradients.mean * (1 - known.beta(0) ** known.step)


def _shared_mean_square(known: Known) -> Tensor:
    return known.gradients.mean_square * (1 - known.beta(1) ** known.step)


def _learning_rate(known: Known) -> float:
    return float(known.group["lr"])


_ADAM: dict[str, Initial] = {
    "exp_avg": _shared_mean,
    "exp_avg_sq": _shared_mean_square,
    "max_exp_avg_sq": _shared_mean_square,
}
_TABLE: dict[type, dict[str, Initial]] = {
    SparseAdamW: {"age": _age, "exp_avg": _aged_mean, "exp_avg_sq": _aged_mean_square},
    optim.Adam: _ADAM,
    optim.AdamW: _ADAM,
    optim.RAdam: _ADAM,
    # NAdam corrects its first moment by a product of its own, which tends to 0 within the first updates.
    optim.NAdam: {"exp_avg": _mean, "exp_avg_sq": _shared_mean_square},
    optim.Adamax: {"exp_avg": _shared_mean, "exp_inf": _root_mean_square},
    optim.RMSprop: {"square_avg": _mean_square, "grad_avg": _mean, "momentum_buffer": zero},
    optim.Adadelta: {"square_avg": _mean_square, "acc_delta": zero},
    optim.Adagrad: {"sum": sum_of_squares},
    optim.Adafactor: {"variance": _mean_square},
    optim.Rprop: {"prev": zero, "step_size": _learning_rate},
    optim.SGD: {"momentum_buffer": zero},
    optim.ASGD: {"ax": zero},
}
# Optimizers that are not imported to be recognised: module and name of the class -> as above.
_TABLE_BY_NAME: dict[str, dict[str, Initial]] = {
    "transformers.optimization.Adafactor": {"exp_avg_sq": _mean_square, "exp_avg": zero},
}
# bitsandbytes runs several optimizers through two classes and tells them apart by a name.
_BITSANDBYTES: dict[str, dict[str, Initial]] = {
    "adam": {"state1": _shared_mean, "state2": _shared_mean_square},
    "lamb": {"state1": _shared_mean, "state2": _shared_mean_square},
    "ademamix": {"state1": _fast_and_slow_mean, "state2": _shared_mean_square},
    "lion": {"state1": _mean},
    "momentum": {"state1": zero},
    "lars": {"state1": zero},
    "rmsprop": {"state1": _mean_square},
    "adagrad": {"state1": sum_of_squares},
}


def is_bitsandbytes(optimizer: optim.Optimizer) -> bool:
    """Whether an optimizer is one of bitsandbytes', or made of one."""
    return any(cls.__module__.startswith("bitsandbytes.optim") for cls in type(optimizer).__mro__)


def initial_values_of(optimizer: optim.Optimizer) -> dict[str, Initial] | None:
    """{name of a state: what grown weights start from} of a known optimizer, or of the known one that it is made of."""
    for cls in type(optimizer).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if cls in _TABLE or name in _TABLE_BY_NAME:
            return _TABLE.get(cls) or _TABLE_BY_NAME[name]
        if cls.__module__.startswith("bitsandbytes.optim"):
            return _BITSANDBYTES.get(getattr(optimizer, "optimizer_name", ""))
    return None

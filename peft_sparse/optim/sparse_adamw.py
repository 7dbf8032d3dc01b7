"""AdamW that knows how old each weight is, so that weights which are grown during training get the right correction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..core.sharded import is_sharded, own_part
from ._float32_state import Float32StateMixin
from .other_states import as_aged

logger = logging.getLogger(__name__)

# Elements that are updated together: on a CPU few enough that a group's tensors stay in its cache over all operations,
# elsewhere enough that few kernels are started.
_GROUP = {"cpu": 2**16}
_GROUP_ELSEWHERE = 2**24
# Ages that a table of bias corrections may cover. It is reached by beta > 0.99998 only.
_LONGEST_TABLE = 2**20


class SparseAdamW(Float32StateMixin, Optimizer):
    """AdamW with an age per weight: the number of gradients in its moments, by which their bias is corrected.

    While all weights of a tensor have the same age, as those of a head always have, `state[p]["age"]` is one number and
    a step is bit for bit that of `torch.optim.AdamW`: on a CPU in float32 and float64 with `fused=True`, elsewhere with
    `foreach=True`. `optim.reindex` makes it a tensor like the values when weights are grown. So
    there is nothing to mark: sparse values and dense parameters may share a group.

    Args:
        params: parameters or groups.
        lr: learning rate >= 0.
        betas: decay of the mean gradient and of the mean squared gradient, each in [0, 1).
        eps: added to the root of the corrected second moment, >= 0.
        weight_decay: lambda >= 0, decoupled. On the values of a delta it pulls the weights to their pretrained values,
            not to zero.
        maximize: ascend instead of descend.

    Attributes:
        state: per parameter "age" (int32, one number on the CPU, or [k] where the values are), "exp_avg" and
            "exp_avg_sq" [k]: float32 for any dtype of the values but float64, also after `load_state_dict`.

    `load_state_dict` also takes what `torch.optim.AdamW` saved, in which all weights of a tensor have one age.

    Raises:
        ValueError: a hyperparameter out of range.
        ConfigError: by `load_state_dict`: another optimizer wrote the state.

    Source: thesis 7.3.1. Differs from the authors' code in: eps is added after the bias correction as torch does (they
    add it before, which makes it larger for young weights), and the age counts correctly for bfloat16 values.
    """

    own_state = ("age", "exp_avg", "exp_avg_sq")
    host_state = ("age",)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr must be >= 0, got {lr}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        if not eps >= 0:
            raise ValueError(f"eps must be >= 0, got {eps}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss anew and returns it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                self._init_state(p)
            shared = [p for p in parameters if self.state[p]["age"].dim() == 0]
            single = [p for p in parameters if self.state[p]["age"].dim() != 0]
            for part in _parts(shared):
                if self._takes_fused(part):
                    self._update_fused(part, group)
                else:
                    self._update(part, group, self._divide_by_shared_age)
            for part in _parts(single):
                self._update(part, group, self._divide_by_own_age)
        return loss

    def _init_state(self, p: Tensor) -> None:
        if self.state[p]:
            return
        if p.grad is not None and p.grad.is_sparse:
            raise ValueError("SparseAdamW needs gradients with one entry per weight, got a torch.sparse gradient")
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        # A distributed checkpoint is loaded into state of the same sizes, so where FSDP2 shards values their ages must
        # not wait for the first weights to be grown.
        has_own = is_sharded(p) and p.dim() == 1
        self.state[p] = {
            "age": torch.zeros_like(p, dtype=torch.int32) if has_own else torch.zeros((), dtype=torch.int32),
            "exp_avg": torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format),
        }

    def _understood(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        aged = as_aged(state_dict)
        if aged is not None:
            logger.warning(
                "SparseAdamW goes on from a state of AdamW: with its moments, and its number of steps as the age of "
                "every weight."
            )
        return super()._understood(state_dict if aged is None else aged)

    def _takes_fused(self, parameters: list[Tensor]) -> bool:
        """Whether torch's kernel computes the step: on a CPU, where it reads and writes everything once."""
        return all(
            type(p) in (Tensor, torch.nn.Parameter)
            and p.device.type == "cpu"
            and p.dtype in (torch.float32, torch.float64)
            and type(p.grad) is Tensor
            and p.grad.dtype == p.dtype == self.state[p]["exp_avg"].dtype
            for p in parameters
        )

    def _update_fused(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in parameters]
        for state in states:
            state["age"].add_(1)
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["age"].to(torch.float32) for state in states],
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
        )

    def _update(self, parameters: list[Tensor], group: dict[str, Any], divide: Callable[..., None]) -> None:
        states = [self.state[p] for p in parameters]
        grads = [p.grad for p in parameters if p.grad is not None]
        if any(map(is_sharded, parameters)):
            # Every operation is per weight, so each process updates the part that it holds.
            states = [{key: own_part(tensor) for key, tensor in state.items()} for state in states]
            grads, parameters = [own_part(grad) for grad in grads], [own_part(p) for p in parameters]
        exp_avgs = [state["exp_avg"] for state in states]
        exp_avg_sqs = [state["exp_avg_sq"] for state in states]
        grads = [_to(grad, m.dtype) for grad, m in zip(grads, exp_avgs, strict=True)]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        lr = float(group["lr"])
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        # Values in a low precision are updated in the moments' precision and rounded once.
        masters = [_to(p, m.dtype) for p, m in zip(parameters, exp_avgs, strict=True)]
        if group["weight_decay"]:
            torch._foreach_mul_(masters, 1 - lr * group["weight_decay"])
        divide(masters, exp_avgs, exp_avg_sqs, [state["age"] for state in states], group)
        for p, master in zip(parameters, masters, strict=True):
            if p is not master:
                p.copy_(master)

    @staticmethod
    def _divide_by_shared_age(
        values: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        ages: list[Tensor],
        group: dict[str, Any],
    ) -> None:
        """The operations of torch.optim.AdamW, in its order."""
        beta1, beta2 = group["betas"]
        for age in ages:
            age.add_(1)
        steps = [float(age) for age in ages]
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominators, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(
            values, exp_avgs, denominators, [-float(group["lr"]) / (1 - beta1**step) for step in steps]
        )

    @staticmethod
    def _divide_by_own_age(
        values: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        ages: list[Tensor],
        group: dict[str, Any],
    ) -> None:
        torch._foreach_add_(ages, 1)
        together = ages[0] if len(ages) == 1 else torch.cat(ages)
        sizes = [age.numel() for age in ages]
        # lr * (m / c1) / (sqrt(v / c2) + eps), with both corrections brought below the line.
        factors, summands = _denominator(together, tuple(group["betas"]), group["eps"], exp_avgs[0].dtype)
        denominators = list(summands.split(sizes))
        torch._foreach_addcmul_(denominators, torch._foreach_sqrt(exp_avg_sqs), list(factors.split(sizes)))
        torch._foreach_addcdiv_(values, exp_avgs, denominators, -float(group["lr"]))


def _denominator(ages: Tensor, betas: tuple[float, float], eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[n] c1 / sqrt(c2) and [n] c1 * eps, with c = 1 - beta**age: looked up, since powers take much longer."""
    # From here on beta**age is lost in the rounding of 1.
    last = max(int(log(torch.finfo(dtype).eps / 4) / log(beta)) + 1 if beta else 1 for beta in betas)
    if last >= _LONGEST_TABLE:
        return _compute_denominator(ages, betas, eps, dtype)
    factors, summands = _tables(betas, eps, dtype, ages.device, last)
    ages = ages.clamp(max=last)
    return factors.index_select(0, ages), summands.index_select(0, ages)


@lru_cache(maxsize=16)
def _tables(
    betas: tuple[float, float], eps: float, dtype: torch.dtype, device: torch.device, last: int
) -> tuple[Tensor, Tensor]:
    factors, summands = _compute_denominator(torch.arange(last + 1), betas, eps, dtype)
    return factors.to(device), summands.to(device)


def _compute_denominator(
    ages: Tensor, betas: tuple[float, float], eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    first, second = (1 - torch.full_like(ages, beta, dtype=torch.float64) ** ages for beta in betas)
    return (first / second.sqrt()).to(dtype), (first * eps).to(dtype)


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _parts(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters on one device and of one dtype, in lists of bounded size."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in parameters:
        by_kind.setdefault((p.device, p.dtype), []).append(p)
    for (device, _), members in by_kind.items():
        limit = _GROUP.get(device.type, _GROUP_ELSEWHERE)
        part: list[Tensor] = []
        size = 0
        for p in members:
            if part and size + p.numel() > limit:
                yield part
                part, size = [], 0
            part.append(p)
            size += p.numel()
        yield part

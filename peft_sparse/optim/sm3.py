"""SM3: an adaptive optimizer whose second moments take one number per row and one per column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..core.backends.native import Kernels, kernels
from ..core.sharded import is_sharded, own_part, sharded_like, whole
from ._float32_state import Float32StateMixin


class Supported(Protocol):
    """What the optimizer needs to know of a delta; `AdapterDelta` is one."""

    values: Any
    indices: Tensor
    shape: tuple[int, ...]


class SM3(Float32StateMixin, Optimizer):
    """SM3-II for sparse deltas and dense parameters.

    Every entry of a tensor is covered by one accumulator for each of its coordinates. The estimate of an entry's summed
    squared gradients is the smallest of its accumulators plus the new square, and an accumulator is the largest
    estimate among its entries. For a delta on a weight [O, I] only tuned entries take part; the accumulators outlive
    them, and SpIEL-MA ranks untuned entries by them.

    Args:
        params: parameters or groups.
        lr: learning rate >= 0.
        deltas: the deltas whose `values` are among the parameters, `[d for *_, d in iter_deltas(model, name)]`. They
            are asked for indices and shape at every step, so they may change their support (carry the state with
            `optim.reindex`). Parameters that are no delta's values are treated as dense.
        momentum: in [0, 1): decay of an average of the preconditioned gradients; 0 keeps none.
        weight_decay: lambda >= 0, decoupled. On the values of a delta it pulls to the pretrained weights.
        eps: added to the estimate, in units of squared gradients, > 0. It holds back weights whose summed squares are
            not well above it: on SmolLM2-135M 28 % of the squared gradients of a batch lie below 1e-8, so that many
            weights start with smaller steps than the first update's lr * sign(gradient).

    Attributes:
        state: per parameter "accumulator_0", "accumulator_1", ...: float32, one number per row, column, ... of a matrix
            (a delta on a tensor with more dimensions counts as a matrix of shape[0] rows), or one per entry of a
            vector; "momentum_buffer" where there is momentum. float32 also after `load_state_dict`.

    Raises:
        ValueError: a hyperparameter out of range.
        ConfigError: by `load_state_dict`: another optimizer wrote the state.

    Source: Anil et al. 2019, arXiv:1901.11150, SM3-II; thesis 7.3.2 and algorithm 3. Differs from the authors' code in:
    arguments of other optimizers are refused, and momentum is carried to a new support.
    """

    own_state = ("accumulator_0",)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        deltas: Iterable[Supported] = (),
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr must be >= 0, got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
        if not eps > 0:
            raise ValueError(f"eps must be > 0, got {eps}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps})
        self.deltas = list(deltas)

    def __getstate__(self) -> dict[str, Any]:
        # A copy made along with the model knows the copied deltas.
        return {**super().__getstate__(), "deltas": self.deltas}

    def row_accumulator(self, values: Tensor) -> Tensor:
        """[O] float32, the accumulators of the rows of the weight that these values stand in.

        Raises:
            ValueError: `values` are no delta's on a tensor of two dimensions or more, or have not been updated yet.
        """
        return self._accumulators(values)[0]

    def column_accumulator(self, values: Tensor) -> Tensor:
        """[I] float32, the accumulators of the columns; for more than two dimensions, of the flattened rest."""
        return self._accumulators(values)[1]

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
        deltas = {id(_held_values(delta)): delta for delta in self.deltas}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group, deltas.get(id(p)))
        return loss

    def _accumulators(self, values: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state.get(values, {})
        if values.dim() == 1 and "accumulator_1" in state:  # as a delta's values alone have
            return state["accumulator_0"], state["accumulator_1"]
        delta = next((delta for delta in self.deltas if _held_values(delta) is values), None)
        if delta is None or len(delta.shape) < 2:
            raise ValueError(
                "rows and columns exist only for the values of a delta on a tensor of two dimensions or more, got "
                f"{'an unknown parameter' if delta is None else f'a delta on shape {delta.shape}'}. "
                "Name the deltas when the optimizer is made: SM3(params, deltas=...)"
            )
        raise ValueError("these values have no accumulators yet: they exist from their first update on")

    def _update(self, p: Tensor, group: dict[str, Any], delta: Supported | None) -> None:
        assert p.grad is not None
        state = self.state[p]
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        if delta is not None and len(delta.shape) < 2:
            # On a vector, a delta has an accumulator per entry, as a vector of its own.
            delta = None
        if "accumulator_0" not in state:
            shape = _matrix(delta.shape) if delta is not None else _cover(p.shape)
            for d, size in enumerate(shape):
                state[f"accumulator_{d}"] = torch.zeros(size, dtype=dtype, device=p.device)
            if group["momentum"]:
                state["momentum_buffer"] = torch.zeros_like(p, dtype=dtype)
        grad = whole(p.grad).to(dtype)
        if delta is not None:
            estimate = accumulate(grad, state["accumulator_0"], state["accumulator_1"], delta.indices)
        else:
            estimate = _dense_estimate(grad, state)
        direction = grad / estimate.add_(group["eps"]).sqrt_()
        if is_sharded(p):
            # Accumulators need the gradient of all processes' parts, and are the same on every one of them.
            direction, p = own_part(sharded_like(direction, p)), own_part(p)
        if "momentum_buffer" in state:
            direction = own_part(state["momentum_buffer"]).lerp_(direction, 1 - group["momentum"])
        master = p if p.dtype == dtype else p.to(dtype)
        lr = float(group["lr"])
        if group["weight_decay"]:
            master.mul_(1 - lr * group["weight_decay"])
        master.add_(direction, alpha=-lr)
        if master is not p:
            p.copy_(master)


def _held_values(delta: Supported) -> Tensor:
    """The parameter that stands for the delta's values in optimizers (another than `values` while FSDP2 gathers it)."""
    return getattr(delta, "held_values", delta.values)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], prod(shape[1:])


def _cover(shape: tuple[int, ...]) -> tuple[Any, ...]:
    """One accumulator per coordinate; per entry for vectors and numbers, where that is as little."""
    return tuple(shape) if len(shape) >= 2 else (tuple(shape),)


def accumulate(grad: Tensor, rows: Tensor, columns: Tensor, indices: Tensor) -> Tensor:
    """Bring the accumulators of a matrix up to date with the gradients of its tuned entries.

    Args:
        grad: [k] in the dtype of the accumulators.
        rows: [O] accumulators, changed in place.
        columns: [I] likewise.
        indices: [k] flat row-major positions of the tuned entries.

    Returns:
        [k] their estimates of the summed squared gradients, with this gradient in them.
    """
    native = _kernels(grad, rows, columns, indices)
    if native is not None:
        estimate = torch.empty_like(grad)
        if native.cover_([(grad, rows, columns, indices, estimate)]):
            return estimate
    flat = indices.long()
    row = flat.div(columns.numel(), rounding_mode="floor")
    column = flat - row * columns.numel()
    estimate = torch.minimum(rows[row], columns[column]).addcmul_(grad, grad)
    # The largest so far, not of this step alone: for a fixed support both are the same, and after a reselection the
    # accumulators must not forget the entries that left.
    rows.scatter_reduce_(0, row, estimate, "amax")
    columns.scatter_reduce_(0, column, estimate, "amax")
    return estimate


def accumulate_all(updates: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
    """`accumulate` for several matrices: (grad, rows, columns, indices) of each."""
    native = [_kernels(*update) for update in updates]
    known = native[0] if updates else None
    done = 0
    if known is not None and None not in native:
        done = known.cover_([(*update, None) for update in updates])
    for update in updates[done:]:
        accumulate(*update)


def _kernels(grad: Tensor, rows: Tensor, columns: Tensor, indices: Tensor) -> Kernels | None:
    is_plain = indices.is_cpu and indices.is_contiguous() and grad.is_contiguous() and grad.shape == indices.shape
    if not is_plain or not (rows.is_contiguous() and columns.is_contiguous()):
        return None
    return kernels(grad, rows, columns, dtypes=(torch.float32,))


def _dense_estimate(grad: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The estimates of all entries of a dense parameter, or of a delta on a vector."""
    if grad.dim() < 2:
        return state["accumulator_0"].addcmul_(grad, grad).clone()
    estimate = None
    for d in range(grad.dim()):
        shape = [1] * grad.dim()
        shape[d] = -1
        accumulator = state[f"accumulator_{d}"].view(shape)
        estimate = accumulator.expand_as(grad) if estimate is None else torch.minimum(estimate, accumulator)
    assert estimate is not None
    estimate = estimate.addcmul(grad, grad)
    for d in range(grad.dim()):
        others = [other for other in range(grad.dim()) if other != d]
        torch.maximum(state[f"accumulator_{d}"], estimate.amax(others), out=state[f"accumulator_{d}"])
    return estimate

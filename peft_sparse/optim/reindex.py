"""Carrying an optimizer's state to a new support: the only file that writes into it.

Whatever has one entry per tuned weight moves with its weight. What that of a grown weight starts from, `grown_state.py`
says for every known optimizer.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, optim

from ..core.sharded import is_sharded, overwrite, sharded_like, whole
from ..errors import ConfigError
from ..selection.replacement import Replacement
from .grown_state import GrownGradients, Initial, Known, initial_values_of, is_bitsandbytes, sum_of_squares, zero
from .quantized_state import dequantize, quantize
from .sm3 import SM3
from .sparse_adamw import SparseAdamW

logger = logging.getLogger(__name__)


def reindex(optimizer: Any, values: Tensor, replacement: Replacement, gradients: GrownGradients | None = None) -> None:
    """Carry the state of a delta's values to a new support.

    Weights that stay keep their state bit for bit (blockwise-quantised state: up to a new quantisation). Grown weights
    start from their estimated gradients, in the way that makes the optimizer's own bias correction right for them, or
    from zero. An optimizer that has no state yet is left alone. The gradient and the values themselves are the
    caller's business, before or after.

    Args:
        optimizer: a torch optimizer, or a wrapper that holds one in `.optimizer` (accelerate's). Known are SparseAdamW,
            SM3, those of torch.optim with one entry per weight, transformers' Adafactor, and bitsandbytes' in 32 and
            8 bits. Of any other, state with one entry per weight is carried and starts at zero, and the rest is left
            alone; a warning says so once.
        values: the parameter [k] that the optimizer holds; only its identity and device matter. If FSDP2 has sharded
            it, every process must call this.
        replacement: from the old support to the new one, of whatever size.
        gradients: estimates for the grown weights; None starts them from zero, with age 0 where there is an age.

    Cost: O(k), one gather per state tensor.
    Source: thesis 7.3.1 ("bias counter-correction"). Differs from the authors' code in: the correction of a seeded
    weight's next update counts that update's own gradient, and shared step counts are honoured.
    """
    optimizer = _unwrap(optimizer)
    group = next((g for g in optimizer.param_groups if any(p is values for p in g["params"])), None)
    if group is None:
        _warn_once(
            f"absent from {type(optimizer).__name__}",
            "%s does not hold the values of a delta whose support changes, so replaced weights inherit the state of "
            "others. Build the optimizer from the model's own parameters, after wrapping",
            type(optimizer).__name__,
        )
        return
    state = optimizer.state.get(values)
    if not state or not replacement.num_grown + replacement.num_dropped:
        return
    known = Known(gradients or _no_gradients(replacement, values), group, float(state.get("step", 0)))
    if isinstance(optimizer, SparseAdamW) and state["age"].dim() == 0:
        state["age"] = sharded_like(state["age"].to(values.device).expand(replacement.old_count), values)
    with torch.no_grad():
        for key, initial in _initial_values(optimizer, state, replacement.old_count):
            _carry(state, key, replacement, initial(known), values.device)


def state_holders(optimizers: Iterable[Any], values: Tensor) -> list[Any]:
    """All optimizers with state of some values, each state once: those given, and what runs them at this moment.

    An optimizer that is built around another (Lookahead and its like) has state of its own.

    Args:
        optimizers: that hold the values.
        values: the parameter.

    Raises:
        ConfigError: one of them keeps tensors of the values outside of its `state`, where they cannot be carried.
    """
    found: dict[int, Any] = {}
    for optimizer in (*map(_unwrap, optimizers), *_running_optimizers()):
        state = getattr(optimizer, "state", None)
        if isinstance(state, Mapping) and any(p is values for g in optimizer.param_groups for p in g["params"]):
            found.setdefault(id(state), optimizer)
            _refuse_hidden_state(optimizer, values)
    # From inside to outside.
    return list(found.values())


def _running_optimizers() -> Iterator[Any]:
    """Whatever has `param_groups` and is in its `step` around the caller, innermost first."""
    frame: Any = sys._getframe(1)
    while (frame := frame.f_back) is not None:
        if frame.f_code.co_name == "step":
            own = frame.f_locals.get("self")
            if hasattr(own, "param_groups"):
                yield own


def _refuse_hidden_state(optimizer: Any, values: Tensor) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, value in vars(optimizer).items():
        if name in ("state", "param_groups", "optimizer"):
            continue
        if any(id(t) not in held and t.shape == values.shape for t in _tensors_in(value) if values.numel() > 1):
            raise ConfigError(
                f"{type(optimizer).__name__}.{name} holds tensors like the values of a delta outside of the "
                "optimizer's `state`, which cannot follow a weight to another place. Keep them in "
                "optimizer.state[parameter], or train without this wrapper."
            )


def _tensors_in(value: Any, depth: int = 3) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, Mapping)):
        for member in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(member, depth - 1)


def _no_gradients(replacement: Replacement, values: Tensor) -> GrownGradients:
    """No gradient seen: every rule below makes of it what the optimizer itself starts from."""
    zero = torch.zeros(replacement.num_grown, device=values.device)
    return GrownGradients(zero, zero, 0)


def _unwrap(optimizer: Any) -> Any:
    while not isinstance(optimizer, optim.Optimizer) or type(optimizer).__module__.startswith("accelerate"):
        if not hasattr(optimizer, "optimizer"):
            break
        optimizer = optimizer.optimizer
    return optimizer


# ---- which state is carried ------------------------------------------------------------------------------------------


def _initial_values(optimizer: optim.Optimizer, state: dict[str, Any], count: int) -> Iterable[tuple[str, Initial]]:
    """The state tensors with one entry per weight, and what grown weights start from."""
    table = initial_values_of(optimizer)
    if table is not None:
        known = [(key, initial) for key, initial in table.items() if isinstance(state.get(key), Tensor)]
        if is_bitsandbytes(optimizer):
            return known
        # A subclass may add state of its own.
        more = [key for key in _entries_per_weight(state, count) if key not in table]
        if more:
            _warn_of_unknown(optimizer, more, [])
        return [*known, *((key, zero) for key in more)]
    if isinstance(optimizer, SM3):
        # With rows and columns the accumulators belong to the weight, whatever their number.
        per_weight: dict[str, Initial] = {"momentum_buffer": zero}
        if "accumulator_1" not in state:
            per_weight["accumulator_0"] = sum_of_squares
        return [(key, initial) for key, initial in per_weight.items() if key in state]
    carried = _entries_per_weight(state, count)
    left = sorted(str(key) for key, t in state.items() if isinstance(t, Tensor) and key not in (*carried, "step"))
    _warn_of_unknown(optimizer, carried, left)
    return [(key, zero) for key in carried]


def _entries_per_weight(state: Mapping[str, Any], count: int) -> list[str]:
    """State with one entry per weight: tensors [..., count] (several moments may be stacked), and lists of them."""

    def fits(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return bool(value) and all(map(fits, value))
        return isinstance(value, Tensor) and value.dim() > 0 and value.shape[-1] == count

    return [key for key, value in state.items() if key != "step" and fits(value)]


def _warn_of_unknown(optimizer: optim.Optimizer, carried: list[str], left: list[str]) -> None:
    _warn_once(
        type(optimizer).__name__,
        "%s is an optimizer whose state is unknown here. When weights are replaced, its %s start at zero for the new "
        "ones, which may make their first updates too large or too small%s. SparseAdamW, SM3, torch.optim's and "
        "bitsandbytes' optimizers are known",
        type(optimizer).__name__,
        " and ".join(carried) or "tensors (there are none with one entry per weight)",
        f"; its {' and '.join(left)} are left as they are" if left else "",
    )


# ---- carrying --------------------------------------------------------------------------------------------------------


def _carry(
    state: dict[str, Any], key: str, replacement: Replacement, fill: Tensor | float, device: torch.device
) -> None:
    old = state[key]
    if isinstance(old, (list, tuple)):
        members = {str(i): member for i, member in enumerate(old)}
        for i in members:
            _carry(members, i, replacement, fill, device)
        state[key] = type(old)(members.values())
        return
    if is_sharded(old):
        overwrite(old, replacement.carry(whole(old).to(replacement.indices.device), fill))
        return
    if old.dtype == torch.uint8:
        # bitsandbytes: state1 is written in the code book qmap1, block by block in units of absmax1.
        number = key.removeprefix("state")
        absmax, code = state[f"absmax{number}"], state[f"qmap{number}"]
        rows = zip(_rows(old), _rows(absmax), strict=True)
        new = _each_row([dequantize(row, units, code) for row, units in rows], old.dim(), replacement, fill)
        quantized = [quantize(row, code) for row in _rows(new)]
        new, new_absmax = (torch.stack(part).view(*old.shape[:-1], -1) for part in zip(*quantized, strict=True))
        _write(state, f"absmax{number}", new_absmax, device)
    else:
        new = _each_row(_rows(old), old.dim(), replacement, fill).view(*old.shape[:-1], replacement.count)
    _write(state, key, new, device)


def _rows(tensor: Tensor) -> list[Tensor]:
    return list(tensor.reshape(-1, tensor.shape[-1]))


def _each_row(rows: Sequence[Tensor], dim: int, replacement: Replacement, fill: Tensor | float) -> Tensor:
    """Carry stacked moments one by one. What grown weights start from is given for each row, or for all of them."""
    fills = list(fill) if isinstance(fill, Tensor) and fill.dim() == 2 else [fill] * len(rows)
    carried = torch.stack([replacement.carry(row, part) for row, part in zip(rows, fills, strict=True)])
    return carried if dim > 1 else carried[0]


def _write(state: dict[str, Any], key: str, new: Tensor, device: torch.device) -> None:
    """In place where the size allows: paged and captured memory must stay where it is."""
    old = state[key]
    if old.shape == new.shape and old.is_contiguous():
        old.copy_(new)
    else:
        state[key] = new.to(device)


_warned: set[str] = set()


def _warn_once(key: str, message: str, *args: object) -> None:
    if key not in _warned:
        _warned.add(key)
        logger.warning(message, *args)

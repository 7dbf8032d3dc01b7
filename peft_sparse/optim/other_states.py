"""Saved states of other optimizers than the one that loads them: taken over where both mean the same, else refused."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.optim import Optimizer

from ..errors import ConfigError

OURS = ("SparseAdamW", "SM3")
# What is in the state of a parameter, and whose it is, or whose kind; the first that fits.
_WRITERS = (("age", "SparseAdamW"), ("accumulator_0", "SM3"), ("exp_avg_sq", "AdamW"), ("momentum_buffer", "SGD"))
_ADAM = {"step", "exp_avg", "exp_avg_sq"}
# Of the groups of Adam and AdamW, and none of SparseAdamW.
_ONLY_ADAM = ("amsgrad", "foreach", "capturable", "fused", "decoupled_weight_decay")


def writer_of(state_dict: Mapping[str, Any]) -> str:
    """What to call the optimizer that wrote a state."""
    entries = {str(key) for entry in state_dict["state"].values() for key in entry}
    for key, name in _WRITERS:
        if key in entries:
            return name
    groups = {str(key) for group in state_dict["param_groups"] for key in group} - {"params"}
    return f"another optimizer, with {sorted(entries or groups)}"


def refuse_other(optimizer: Optimizer, state_dict: Mapping[str, Any], *, keeps: Collection[str]) -> None:
    """Refuse a state that an optimizer could load, and not make a step with.

    Args:
        optimizer: that is about to load it; nothing of it has changed yet.
        state_dict: the state.
        keeps: names that its own state has for every parameter that was updated.

    Raises:
        ConfigError: another optimizer wrote it.
    """
    entries = [entry.keys() for entry in state_dict["state"].values() if entry]
    # torch adds the one that is left out here, and later than to the groups.
    settings = optimizer.defaults.keys() - {"differentiable"}
    groups = [group.keys() for group in state_dict["param_groups"]]
    if any(set(keeps) - own for own in entries) or any(settings - own for own in groups):
        raise _error(optimizer, writer_of(state_dict))


@contextmanager
def refusing_ours(optimizer: Optimizer) -> Iterator[None]:
    """While open, an optimizer of other kinds refuses a state of `SparseAdamW` or `SM3`, in which it would not find its
    own.

    Raises:
        ConfigError: it was to load one.
    """

    def look(_: Optimizer, state_dict: dict[str, Any]) -> None:
        writer = writer_of(state_dict)
        if writer in OURS and all(cls.__name__ != writer for cls in type(optimizer).__mro__):
            raise _error(optimizer, writer)

    handle = None
    with suppress(AttributeError):  # DeepSpeed's are no optimizers of torch
        handle = optimizer.register_load_state_dict_pre_hook(look)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _error(optimizer: Optimizer, writer: str) -> ConfigError:
    return ConfigError(
        f"the state of the optimizer was written by {writer}, and this run's is {type(optimizer).__name__}, which "
        "keeps other things of every weight. Resume with the optimizer that the run began with: in a trainer by "
        "optimizer_cls_and_kwargs=(class, {...}); where that is left open, SpIEL has SparseAdamW or SM3 under "
        "SparseTrainer, and AdamW under a plain Trainer. To begin its moments anew, resume from a copy of the "
        "checkpoint without optimizer.pt."
    )


def as_aged(state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state of `torch.optim.AdamW` as `SparseAdamW` has it: all weights of a tensor are as old as it has steps.

    Returns:
        None for any other state, with AMSGrad's maxima for example, or with a decay that is in the moments.
    """
    state, groups = state_dict["state"], state_dict["param_groups"]
    is_adam = any(state.values()) and all(not entry or entry.keys() == _ADAM for entry in state.values())
    if not is_adam or any("amsgrad" not in group for group in groups):
        return None
    if any(group["weight_decay"] and not group.get("decoupled_weight_decay", True) for group in groups):
        return None
    aged = {
        i: {"age": torch.tensor(int(entry["step"]), dtype=torch.int32)}
        | {key: value for key, value in entry.items() if key != "step"}
        if entry
        else {}
        for i, entry in state.items()
    }
    kept = [{key: value for key, value in group.items() if key not in _ONLY_ADAM} for group in groups]
    return {**state_dict, "state": aged, "param_groups": kept}

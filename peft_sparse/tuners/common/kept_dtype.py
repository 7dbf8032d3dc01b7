"""Undoing the casts of trainers: adapters keep the dtype that they were given."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import nn

from ...core.sharded import in_several_processes

logger = logging.getLogger(__name__)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def undo_cast(parameter: nn.Parameter, dtype: torch.dtype, *, what: str, in_forward: bool) -> None:
    """Give a parameter its dtype back after an assignment to its `data`; says so once.

    TRL's trainers do that to all that is trainable over a quantised base, and in bfloat16 most updates are lost.

    Args:
        parameter: what was cast.
        dtype: its own.
        what: "The values of a sparse adapter", for the message.
        in_forward: several processes may have built on the parameter as it is (DDP would lose its hooks), so that
            then a warning must do.
    """
    narrow = parameter.dtype
    if in_forward and in_several_processes():
        _warn_once(
            f"{what} train in {narrow} instead of {dtype}: the trainer cast them before it distributed the model. Use "
            "SparseSFTTrainer, or sparse_trainer(...) of your trainer."
        )
        return
    gradient, parameter.grad = parameter.grad, None
    parameter.data = parameter.data.to(dtype)
    parameter.grad = None if gradient is None else gradient.to(dtype)
    _warn_once(
        f"{what} had been cast to {narrow} (TRL's trainers do that over a quantised base) and are {dtype} again. Those "
        "that were not zero were rounded: to go on with a trained adapter, load it after the trainer is made."
    )


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)

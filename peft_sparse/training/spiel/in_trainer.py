"""What a sparse trainer adds for adapters that reselect: the optimizer made for them, and figures in the log."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from ...optim.sm3 import SM3
from ...optim.sparse_adamw import SparseAdamW
from .reselector import iter_reselectors

# transformers' default and its twin: what a user has who did not choose. Any other optimizer is theirs, and stays.
_DEFAULT_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def optimizer_for(model: nn.Module, args: TrainingArguments) -> tuple[type[Optimizer], dict[str, Any]] | None:
    """The optimizer for a model with reselecting adapters, if the training arguments leave it open.

    `SparseAdamW`, with an age per weight, in the place of AdamW and with its arguments; `SM3` with the same learning
    rate if any of the adapters is SpIEL-MA, whose method it is part of.

    Returns:
        class and arguments, as `Trainer(optimizer_cls_and_kwargs=...)` takes them; None to leave it to the trainer.
    """
    reselectors = list(iter_reselectors(model))
    if not reselectors or args.optim not in _DEFAULT_OPTIMIZERS:
        return None
    if any(reselector.config.own_optimizer == "sm3" for reselector in reselectors):
        deltas = [delta for reselector in reselectors for delta in reselector.deltas.values()]
        return SM3, {"lr": args.learning_rate, "deltas": deltas}
    betas = (args.adam_beta1, args.adam_beta2)
    return SparseAdamW, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}


def figures(model: nn.Module, since: int) -> dict[str, float]:
    """Figures of each adapter's latest reselection, for the log.

    Args:
        model: the model.
        since: only reselections after this update count.

    Returns:
        {"share_replaced": ..., "mean_age": ..., "mean_abs_delta": ...}; names start with the adapter's if there are
        several. Empty if nothing was reselected.
    """
    latest = {
        r.adapter_name: r.history[-1] for r in iter_reselectors(model) if r.history and r.history[-1].update > since
    }
    shown: dict[str, float] = {}
    for name, last in latest.items():
        prefix = f"{name}/" if len(latest) > 1 else ""
        for figure in ("share_replaced", "mean_age", "mean_abs_delta"):
            shown[prefix + figure] = getattr(last, figure)
    return shown

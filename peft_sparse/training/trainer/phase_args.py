"""dense_args and mask_args: the training arguments of a first phase, as changes to those of the second one."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Mapping
from enum import Enum
from typing import Any

from transformers import TrainingArguments

from ...errors import ConfigError

# What a trainer reads anew in every call of train(). All else it reads once, when it is made, and so for both phases.
PER_PHASE = frozenset(
    [
        "learning_rate",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "optim",
        "optim_args",
        "optim_target_modules",
        "num_train_epochs",
        "max_steps",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "warmup_ratio",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "eval_accumulation_steps",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "logging_nan_inf_filter",
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_only_model",
        "seed",
        "ignore_data_skip",
        "dataloader_drop_last",
        "dataloader_num_workers",
        "dataloader_prefetch_factor",
        "train_sampling_strategy",
    ]
)


def make_first_args(
    args: TrainingArguments, changes: Mapping[str, Any] | None, *, name: str, in_place: bool = False
) -> TrainingArguments:
    """The training arguments of the first of two phases.

    Weight decay is 0 unless `changes` says otherwise: in a dense phase it moves every weight, and the selection would
    take that for learning. A length given in epochs replaces one given in steps. Nothing of the first phase is pushed
    to the Hub.

    Args:
        args: the trainer's own arguments, which the second phase uses. They are not changed.
        changes: {field: value} for the first phase.
        name: what the user calls them: "dense_args" or "mask_args".
        in_place: change `args` instead, which are those of a first phase already.

    Returns:
        New arguments of the same class; or `args`.

    Raises:
        ConfigError: an unknown field, or one that holds for both phases.
    """
    if changes is not None and not isinstance(changes, Mapping):
        raise ConfigError(
            f"{name} must be a mapping {{field: value}}, got a {type(changes).__name__}. Name what differs from args."
        )
    changes = dict(changes or {})
    for field in changes:
        _check_field(args, field, name)
    if "num_train_epochs" in changes:
        changes.setdefault("max_steps", -1)
    # Not dataclasses.replace: making training arguments anew resets the state of the accelerator that the trainer has
    # by now.
    first = args if in_place else copy.copy(args)
    for field, value in {"weight_decay": 0.0, "push_to_hub": False, **changes}.items():
        current = getattr(args, field)
        setattr(first, field, type(current)(value) if isinstance(current, Enum) else value)
    _derive(first, changes)
    return first


def _derive(first: TrainingArguments, changes: dict[str, Any]) -> None:
    """What the arguments derive from each other when they are made."""
    if first.eval_strategy == "steps" and not first.eval_steps:
        first.eval_steps = first.logging_steps
    if first.load_best_model_at_end and first.metric_for_best_model is None:
        first.metric_for_best_model = "loss"
    if first.metric_for_best_model is not None and (
        "metric_for_best_model" in changes or first.greater_is_better is None
    ):
        first.greater_is_better = changes.get("greater_is_better", not first.metric_for_best_model.endswith("loss"))
    if hasattr(first, "_validate_args"):
        first._validate_args()


def _check_field(args: TrainingArguments, field: str, name: str) -> None:
    known = {own.name for own in dataclasses.fields(args) if own.init}
    if field not in known:
        close = difflib.get_close_matches(field, sorted(known & PER_PHASE), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {sorted(known & PER_PHASE)}."
        raise ConfigError(f"{name}: {field!r} is no field of {type(args).__name__}; {hint}")
    if field not in PER_PHASE:
        raise ConfigError(
            f"{name}: {field!r} is read when the trainer is made, so it holds for both phases. Set it in args instead."
        )

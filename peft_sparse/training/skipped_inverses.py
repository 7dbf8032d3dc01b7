"""Refusing trainers that multiply by the output matrix themselves: invertible adapters are undone before its module."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigError
from ..tuners.bottleneck.iteration import iter_layers
from ..tuners.bottleneck.placement import INVERTIBLE
from ..tuners.common.events import ON_INVERTIBLE
from .callbacks import add_to_every_trainer

# The argument of the forward that TRL's trainers put in place of a model's own.
_FUSED = "fused_lm_head"


def refuse_skipped_inverses(args: TrainingArguments, model: nn.Module) -> None:
    """Raise a ConfigError if the trainer computes the loss past the module before which invertible adapters are undone.

    Args:
        args: the trainer's.
        model: what it trains or evaluates, wrapped or not.
    """
    if args.use_liger_kernel or any(map(_is_fused, model.modules())):
        names = sorted({name for _, layer in iter_layers(model) for name in _invertible(layer)})
        if names:
            raise ConfigError(
                f"invertible: this trainer multiplies by the output matrix itself, and would leave out the inverse of "
                f"the adapters {names}, which the model has. TRL's trainers do so, and use_liger_kernel=True does. "
                "Train with transformers' Trainer or SparseTrainer without it, or take invertible=None."
            )


def _is_fused(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)
    return code is not None and _FUSED in code.co_varnames


def _invertible(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if layer.placements.get(name) == INVERTIBLE]


class SkippedInversesCallback(TrainerCallback):
    """Refuses to train or evaluate a model without a part of it, in every trainer that is built from then on."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        refuse_skipped_inverses(args, model)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        refuse_skipped_inverses(args, model)


ON_INVERTIBLE.append(partial(add_to_every_trainer, SkippedInversesCallback))

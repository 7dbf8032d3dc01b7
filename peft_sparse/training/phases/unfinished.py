"""Adapters that have a first phase before them, in trainers that know no phases: refused, or warned of."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...errors import ConfigError
from ...tuners.common.adapter_config import carriers_of
from ...tuners.common.base_model import base_model_of
from ...tuners.common.events import ON_UNFINISHED
from ...tuners.sparse_ft.iteration import iter_deltas
from ...tuners.sparse_ft.unselected import HOW_TO_SELECT, is_unselected, open_phase
from ..callbacks import add_to_every_trainer
from .mask_phase import is_in_mask_phase

logger = logging.getLogger(__name__)


class FirstPhaseCallback(TrainerCallback):
    """Refuses to train what cannot train, in every trainer that is built from then on."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        check_training(model)


def check_training(model: Any) -> None:
    """Look for active adapters that have a first phase before them, at the beginning of a training run.

    An adapter of Ada-SFT does train, if only its masks: that is worth a warning.

    Args:
        model: what is about to be trained, wrapped or not; with or without adapters.

    Raises:
        ConfigError: the weights of an active adapter are not selected, and no dense phase of it is open.
    """
    for carrier in carriers_of(model):
        _check_carrier(carrier)


def _check_carrier(carrier: Any) -> None:
    phase = open_phase(base_model_of(carrier))
    names = [name for name in carrier.peft_config if phase is None or phase.adapter_name != name]
    waiting = [name for name in names if is_unselected(carrier.peft_config[name]) and _is_active(carrier, name)]
    if waiting:
        raise ConfigError(
            f"the weights of the active adapters {waiting} "
            f"({', '.join(sorted({type(carrier.peft_config[name]).__name__ for name in waiting}))}) are not selected "
            f"yet, so this trainer would train nothing of them. {HOW_TO_SELECT}"
        )
    masks = [name for name in names if is_in_mask_phase(carrier, name)]
    if masks:
        logger.warning(
            "this trainer trains the masks of the adapters %s, the first phase of Ada-SFT, and not the weights under "
            "them. Call start_weight_phase(model) afterwards and train again; or use sparse_trainer(YourTrainer) "
            "(SparseTrainer, SparseSFTTrainer), which does both.",
            masks,
        )


def _is_active(model: nn.Module, adapter_name: str) -> bool:
    layers = (layer for _, layer, _, _ in iter_deltas(model, adapter_name))
    return any(adapter_name in layer.active_adapters for layer in layers)


ON_UNFINISHED.append(partial(add_to_every_trainer, FirstPhaseCallback))

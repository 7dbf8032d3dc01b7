"""Refusing to train adapters that are merged into the base weights: the run would leave them as they are."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._peft_bridge import BaseTunerLayer
from ..errors import ConfigError
from ..tuners.common.base_model import modules_around_adapters
from ..tuners.common.events import ON_MERGE
from .callbacks import add_to_every_trainer


def refuse_merged(model: nn.Module) -> None:
    """Refuse to train adapters that are merged: the model computes with the base weights, and only heads would train.

    Args:
        model: what is about to be trained, wrapped or not.

    Raises:
        ConfigError: an adapter that is to be trained is merged.
    """
    for path, layer in modules_around_adapters(model):
        if not isinstance(layer, BaseTunerLayer) or not getattr(layer, "merged", False):
            continue
        slots = [layer._modules.get(name) for name in layer.adapter_layer_names]
        if any(p.requires_grad for slot in slots if slot is not None for p in slot.parameters()):
            raise ConfigError(
                f"the adapters {layer.merged_adapters} are merged (at {path}), so the run would leave them as they "
                "are: model.unmerge_adapter() first. To train heads alone on merged weights: merge_and_unload()."
            )


class MergedCallback(TrainerCallback):
    """Refuses to train merged adapters, in every trainer that is built from then on."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        refuse_merged(model)


ON_MERGE.append(partial(add_to_every_trainer, MergedCallback))

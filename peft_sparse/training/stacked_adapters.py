"""Several active adapters in transformers' own trainer, which resumes, and loads the best of, the first one alone."""

from __future__ import annotations

from functools import partial
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigError
from ..tuners.common.base_model import tensors_of_adapter
from ..tuners.common.events import ON_STACK
from .callbacks import add_to_every_trainer

WAY_OUT = "SparseTrainer and sparse_trainer(YourTrainer) bring back all that train."


class StackedAdaptersCallback(TrainerCallback):
    """Refuses what would bring back one of several active adapters, in every trainer that is built from then on.

    transformers' trainer loads the first active adapter of a checkpoint and leaves the others out of the model's sum.
    """

    def __init__(self) -> None:
        self._active: list[str] = []

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember what is active; a resumed run does not show it any more."""
        model = kwargs.get("model")
        self._active = list(model.active_adapters) if isinstance(model, PeftModel) else []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Look at what the trainer was asked for.

        Raises:
            ConfigError: it is resumed, or is to load the best model at the end, with several active adapters.
        """
        if len(self._active) < 2:
            return
        if state.global_step > 0:
            raise ConfigError(
                f"resume_from_checkpoint: the adapters {self._active} were active, and this trainer has brought back "
                f"{self._active[0]!r} alone. {WAY_OUT} Make model and trainer anew."
            )
        refuse_best(args, model, self._active)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Look again: the model may activate several adapters with its first batch, as `LanguageSwitch` has it do.

        Raises:
            ConfigError: the best model is to be loaded at the end, and would be one of them alone.
        """
        if isinstance(model, PeftModel):
            refuse_best(args, model, list(model.active_adapters))


def refuse_best(args: TrainingArguments, model: nn.Module, active: list[str]) -> None:
    """Raise a ConfigError if the trainer is to load the best model at the end, and others than the first one train."""
    behind = [name for name in active[1:] if trains(model, name)] if args.load_best_model_at_end else []
    if behind:
        raise ConfigError(
            f"load_best_model_at_end=True: of the active adapters {active} this trainer would load the best "
            f"{active[0]!r} alone, and {behind} train. {WAY_OUT}"
        )


def trains(model: nn.Module, adapter_name: str) -> bool:
    """Whether anything of an adapter, of whatever type, trains: its own tensors or its heads."""
    return any(tensor.requires_grad for tensor in tensors_of_adapter(model, adapter_name))


ON_STACK.append(partial(add_to_every_trainer, StackedAdaptersCallback))

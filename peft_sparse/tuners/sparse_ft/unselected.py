"""Adapters whose weights are yet to be selected, or to come from a file: until then an attempt to train is an error."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ...errors import ConfigError
from ...optim.step_watch import Step, StepWatch, all_parameters
from .configs.base import SparseConfig

logger = logging.getLogger(__name__)

# Where a base model remembers the first phase that is open on it: an attribute and not a global, so that both die
# together.
_PHASE = "_sparse_ft_open_phase"


@dataclass
class Selection:
    """What the deltas of an adapter share: whether its weights were selected.

    Attributes:
        adapter_name: the adapter.
        config: the model's copy of its config.
        awaits_file: whether nothing can select them, and they come from a file.
        is_made: whether any delta of it holds weights, or has held some.
    """

    adapter_name: str
    config: SparseConfig
    awaits_file: bool = False
    is_made: bool = False

    def note(self, name: str, count: int) -> None:
        """A tensor has its weights, by a selection or a load of whatever kind."""
        self.is_made = True
        if not self.awaits_file:
            # torch's own `load_state_dict` tells no config.
            self.config.counts = {} if self.config.counts is None else self.config.counts
            self.config.counts[name] = count


class Waiting(Protocol):
    """A delta of such an adapter."""

    selection: Selection | None

    @property
    def is_unset(self) -> bool:
        """Whether it has values whose indices nobody has ever set."""

    @property
    def held_values(self) -> nn.Parameter:
        """What optimizers hold of it."""


def open_phase(base_model: nn.Module) -> Any:
    """The first phase that is open on a base model; None if there is none."""
    return base_model.__dict__.get(_PHASE)


def set_open_phase(base_model: nn.Module, phase: Any) -> None:
    """Remember the first phase that opens on a base model; None as it closes."""
    if phase is None:
        base_model.__dict__.pop(_PHASE, None)
    else:
        base_model.__dict__[_PHASE] = phase


def is_unselected(config: Any) -> bool:
    """Whether a config is of an adapter that a first phase (dense, by gradients) has yet to choose the weights of."""
    return isinstance(config, SparseConfig) and config.first_phase is not None


HOW_TO_SELECT = (
    "Train with SparseSFTTrainer, SparseTrainer or sparse_trainer(YourTrainer), which select the weights first. In a "
    "loop of your own, start_dense_phase(model) (LT-SFT, DeFT-X) or select_by_gradients(model, batches) (criteria that "
    "look at gradients) comes first."
)


NEVER_CHOSEN = (
    "were never chosen: their configs were made for adapters that exist, and none was loaded into them. To go on with "
    "such an adapter load it: PeftModel.from_pretrained(base, folder, is_trainable=True). For a new one take a config "
    "that chooses weights, or copies the choice: GivenConfig(support=folder)."
)


def warn_of_saving(base_model: nn.Module, adapter_name: str, config: SparseConfig, deltas: Iterable[Waiting]) -> None:
    """Say that an adapter is saved which holds nothing; a checkpoint in its own dense phase is no news."""
    if any(delta.is_unset for delta in deltas):
        logger.warning("adapter %r is saved as it is: its weights %s", adapter_name, NEVER_CHOSEN)
    phase = open_phase(base_model)
    if is_unselected(config) and (phase is None or phase.adapter_name != adapter_name):
        logger.warning(
            "adapter %r is saved without weights: none are selected yet, so it changes nothing. %s",
            adapter_name,
            HOW_TO_SELECT,
        )


def _tell(watched: tuple[Waiting, ...], step: Step) -> None:
    held = list(all_parameters(step.optimizer))
    ids = {id(parameter) for parameter in held}
    for delta in watched:
        if delta.selection is None or (delta.selection.is_made and not delta.is_unset):
            unselected.discard(delta)
    waiting = [delta for delta in unselected if id(delta.held_values) in ids]
    unset = [delta for delta in waiting if delta.is_unset and delta.held_values.requires_grad]
    if unset:
        raise ConfigError(f"the weights of the adapters {_names(unset)} {NEVER_CHOSEN}")
    waiting = [delta for delta in waiting if not delta.is_unset]
    if not waiting:
        return
    if not any(parameter.numel() and parameter.requires_grad for parameter in held):
        raise ConfigError(f"this optimizer has nothing to train: {_have_no_weights(waiting)} {HOW_TO_SELECT}")
    told = [delta for delta in waiting if delta.held_values.requires_grad]
    if told:
        logger.warning("%s This optimizer trains what else it holds. %s", _have_no_weights(told), HOW_TO_SELECT)
        for delta in told:
            unselected.discard(delta)


def _have_no_weights(deltas: Sequence[Waiting]) -> str:
    return f"the weights of the adapters {_names(deltas)} are not selected yet."


def _names(deltas: Sequence[Waiting]) -> list[str]:
    return sorted({delta.selection.adapter_name for delta in deltas if delta.selection is not None})


# Deltas of such adapters, until the first step after the selection. An adapter that is deleted takes itself out.
unselected: StepWatch[Waiting] = StepWatch(register_optimizer_step_pre_hook, _tell)

"""The callback by which any Hugging Face trainer tells SpIEL how long it runs, and keeps its state in checkpoints."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...errors import ConfigError
from ...files import atomic_file, save_tensors
from ...tuners.common.base_model import base_models_in
from ...tuners.sparse_ft.unselected import open_phase
from ..decay import decay_deltas_only
from ..fitted_rate import iter_rate_fits
from ..merged import refuse_merged
from ..rates import warn_of_rate
from ..trainer.completeness import STATE as TRAINER_STATE
from ..trainer.completeness import naming
from .reselector import iter_reselectors
from .same_adapter import holds_adapters
from .saved_state import check_state

logger = logging.getLogger(__name__)

STATE_FILE = "sparse_training_state.safetensors"


class ReselectionCallback(TrainerCallback):
    """Gives the length of the run to reselecting adapters, and their training state to checkpoints.

    It is among transformers' default callbacks (`start.tell_trainers`), so that a plain `Trainer`, or TRL's, needs no
    word.
    """

    def __init__(self) -> None:
        self._before_update: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        reselectors, fits = list(iter_reselectors(model)), list(iter_rate_fits(model))
        if reselectors:
            refuse_merged(model)
            warn_of_rate(model, kwargs.get("optimizer"))
            decay_deltas_only(kwargs.get("optimizer"), model)
        # A sparse trainer has read the state already, from wherever its checkpoint lies. It may count fewer updates
        # than the trainer has steps: those that a loss scaler skipped.
        is_read = state.global_step > 0 and any(driver.is_restored for driver in (*reselectors, *fits))
        for reselector in reselectors:
            if reselector.config.max_grad_norm is None:
                reselector.max_grad_norm = args.max_grad_norm or None
            if is_read and reselector.is_restored:
                reselector.set_total_steps(state.max_steps)
            else:
                reselector.begin_training(state.max_steps)
        if state.global_step and not is_read and not _is_in_dense_phase(model) and adapters_with_state(model):
            resume(model, args, state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if args.should_save and not _is_in_dense_phase(model):
            save_state(model, Path(args.output_dir, f"checkpoint-{state.global_step}"))

    # transformers writes a checkpoint that answers a SIGTERM without `on_save`: at one of its own callbacks, which come
    # after this one. What belongs to it is the state before the update that follows.

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if args.enable_jit_checkpoint and args.should_save:
            self._before_update = _tensors(model)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self._complete(args, state, control, self._before_update)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self._complete(args, state, control, _tensors(model))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self._complete(args, state, control, _tensors(model))
        for reselector in iter_reselectors(model):
            if state.global_step and not reselector.update and reselector.is_trainable:
                logger.warning(
                    "%d steps were made, and none of them updated adapter %r, so its weights were never replaced: the "
                    "optimizer holds other tensors than its values, every step was skipped, or the adapter is not "
                    "active. Build the optimizer from model.parameters(), after wrapping.",
                    state.global_step,
                    reselector.adapter_name,
                )

    @staticmethod
    def _complete(
        args: TrainingArguments, state: TrainerState, control: TrainerControl, tensors: dict[str, Tensor]
    ) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        is_just_in_time = args.enable_jit_checkpoint and control.should_training_stop and args.should_save
        if is_just_in_time and folder.is_dir() and not Path(folder, STATE_FILE).exists():
            _write(tensors, folder)


def adapters_with_state(model: nn.Module) -> set[str]:
    """The adapters of a model that `save_state` keeps anything of."""
    fits = (fit for fit in iter_rate_fits(model) if fit.has_state)
    return {driver.adapter_name for driver in (*iter_reselectors(model), *fits)}


def _is_in_dense_phase(model: nn.Module) -> bool:
    """Whether a first phase is open whose checkpoints lie elsewhere, hold no adapter, and so nothing of this."""
    phases = [open_phase(base) for base in base_models_in(model)]
    return any(phase is not None and not getattr(phase, "holds_adapter", False) for phase in phases)


def save_state(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the training state of a model's reselecting adapters, and what `fitted_rate` has measured, into a
    checkpoint; nothing if there are none.

    Args:
        model: the model, wrapped or not.
        folder: the checkpoint.
    """
    _write(_tensors(model), folder)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for driver in (*iter_reselectors(model), *iter_rate_fits(model)):
        own = {f"{driver.adapter_name}/{key}": tensor for key, tensor in driver.state_dict().items()}
        if not own.keys().isdisjoint(tensors):
            raise ConfigError(
                f"several parts of this {type(model).__name__} have an adapter {driver.adapter_name!r}, and one file "
                "cannot hold the training state of both: give each a name of its own (adapter_name=...)."
            )
        tensors |= own
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _of_adapter(adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `_tensors` gave of one adapter, under its own keys."""
    prefix = f"{adapter_name}/"
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _write(tensors: dict[str, Tensor], folder: str | os.PathLike[str]) -> None:
    if tensors:
        path = Path(folder, STATE_FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            save_tensors(tensors, temporary)


def load_state(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Read what `save_state` wrote; the adapters of the same checkpoint have to be loaded before.

    An adapter that the checkpoint does not know, because it was added later, starts afresh, and the log names it.

    Raises:
        FormatError: the state is of another adapter, or damaged; no reselector is changed then.
        FileNotFoundError: the checkpoint has no state.
    """
    path = Path(folder, STATE_FILE)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the checkpoint has no state of reselecting adapters.")
    with naming(str(path)):
        tensors = load_file(path)
    states = {}
    for reselector in iter_reselectors(model):
        if state := _of_adapter(reselector.adapter_name, tensors):
            check_state(state, reselector.deltas, name=f"{path} (adapter {reselector.adapter_name!r})")
            states[reselector] = state
        else:
            logger.warning("%s does not know adapter %r: its reselection starts afresh.", path, reselector.adapter_name)
    with naming(str(path)):
        for reselector, state in states.items():
            reselector.load_state_dict(state)
        for fit in iter_rate_fits(model):
            fit.load_state_dict(_of_adapter(fit.adapter_name, tensors))


def resume(model: nn.Module, args: TrainingArguments, global_step: int) -> None:
    """Find and load the state of the checkpoint that a trainer resumes from, which it does not tell its callbacks."""
    folders = [Path(args.output_dir, f"checkpoint-{global_step}")]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    found = [folder for folder in folders if all(Path(folder, name).is_file() for name in (STATE_FILE, TRAINER_STATE))]
    for folder in found:
        if holds_adapters(folder, model, adapters_with_state(model)):
            load_state(model, folder)
            return
    why = "belongs to other weights than those that were resumed, in" if found else "was not found in"
    reselectors, fits = list(iter_reselectors(model)), [fit for fit in iter_rate_fits(model) if fit.has_state]
    what = []
    if reselectors:
        what.append(
            f"reselection goes on from update {global_step} without the open window and the ages of the weights"
        )
    if fits:
        what.append("the inputs that fitted_rate looks at are measured anew")
    logger.warning(
        "%s %s %s: %s. Call peft_sparse.load_training_state(model, checkpoint) in a callback, or use SparseTrainer.",
        STATE_FILE,
        why,
        " or ".join(map(str, found or folders)),
        ", and ".join(what),
    )
    for reselector in reselectors:
        reselector.skip_to(global_step)
    for fit in fits:
        fit.begin()

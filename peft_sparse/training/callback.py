"""What a Hugging Face trainer has to tell SpIEL, and what it has to keep for it: any trainer gets this by itself."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import transformers.trainer
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import atomic_file, save_tensors
from .reselector import iter_reselectors

logger = logging.getLogger(__name__)

STATE_FILE = "sparse_training_state.safetensors"


class ReselectionCallback(TrainerCallback):
    """Gives the length of the training to reselecting adapters, and their training state to checkpoints.

    `install` puts it into the default callbacks of transformers, so that a plain `Trainer`, or TRL's, needs no word.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        reselectors = list(iter_reselectors(model))
        # A sparse trainer has loaded the state already, from wherever its checkpoint lies. It may count fewer updates
        # than the trainer has steps: those that a loss scaler skipped.
        is_loaded = state.global_step > 0 and all(r.is_restored for r in reselectors)
        for reselector in reselectors:
            if reselector.config.max_grad_norm is None:
                reselector.max_grad_norm = args.max_grad_norm or None
            if is_loaded:
                reselector.set_total_steps(state.max_steps)
            else:
                reselector.begin_training(state.max_steps)
        if reselectors and state.global_step and not is_loaded:
            resume(model, args, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        for reselector in iter_reselectors(model):
            if state.global_step and not reselector.update and reselector.is_trainable:
                logger.warning(
                    "%d steps were made, and none of them updated adapter %r, so its weights were never replaced: the "
                    "optimizer holds other tensors than its values, every step was skipped, or the adapter is not "
                    "active. Build the optimizer from model.parameters(), after wrapping.",
                    state.global_step,
                    reselector.adapter_name,
                )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if args.should_save:
            save_state(model, Path(args.output_dir, f"checkpoint-{state.global_step}"))


def install() -> None:
    """Make every trainer that is built from now on use the callback; a second call changes nothing."""
    if ReselectionCallback not in transformers.trainer.DEFAULT_CALLBACKS:
        transformers.trainer.DEFAULT_CALLBACKS.append(ReselectionCallback)


def save_state(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the training state of a model's reselecting adapters into a checkpoint; nothing if there are none.

    Args:
        model: the model, wrapped or not.
        folder: the checkpoint.
    """
    tensors = {
        f"{reselector.adapter_name}/{key}": tensor.cpu().contiguous()
        for reselector in iter_reselectors(model)
        for key, tensor in reselector.state_dict().items()
    }
    if tensors:
        path = Path(folder, STATE_FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            save_tensors(tensors, temporary)


def load_state(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Read what `save_state` wrote; the adapters of the same checkpoint have to be loaded before.

    Raises:
        FormatError: the state is of another adapter.
        FileNotFoundError: the checkpoint has no state.
    """
    tensors = load_file(Path(folder, STATE_FILE))
    for reselector in iter_reselectors(model):
        prefix = f"{reselector.adapter_name}/"
        reselector.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def resume(model: nn.Module, args: TrainingArguments, global_step: int) -> None:
    """Find and load the state of the checkpoint that a trainer resumes from, which it does not tell its callbacks."""
    folders = [Path(args.output_dir, f"checkpoint-{global_step}")]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    for folder in folders:
        if Path(folder, STATE_FILE).is_file():
            load_state(model, folder)
            return
    logger.warning(
        "%s was not found in %s: reselection goes on from update %d without the open window and the ages of the "
        "weights. Call peft_sparse.load_training_state(model, checkpoint) in a callback, or use SparseTrainer.",
        STATE_FILE,
        " or ".join(map(str, folders)),
        global_step,
    )
    for reselector in iter_reselectors(model):
        reselector.skip_to(global_step)

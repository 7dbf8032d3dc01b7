"""Checkpoints of a trainer whose training has phases: where they lie, and which adapters they bring back."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...files import AtomicFolder
from ...tuners.ada_sft.config import AdaSftConfig
from ...tuners.ada_sft.iteration import iter_masked
from ...tuners.sparse_ft.configs.base import SparseConfig
from ...tuners.sparse_ft.iteration import iter_deltas
from ..phases.dense_checkpoint import load_dense_phase, save_dense_phase
from ..phases.dense_phase import DensePhase
from ..phases.mask_phase import MaskPhase, check_mask_checkpoint, save_mask_phase
from ..spiel.callback import STATE_FILE, load_state, save_state
from ..spiel.reselector import iter_reselectors
from .completeness import STATE, Needs, check_moments, folder_of, knows, naming
from .preemption import is_just_in_time
from .resume import FIRST_FOLDERS, SELECTION_FILE, SELECTION_FOLDER

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class PhaseCheckpoints(_Base):
    """Saving and loading of `TwoPhaseTraining`.

    The first phase's checkpoints lie in a folder of their own; those of the second one are a trainer's ordinary ones.
    """

    # The first phase that is under way.
    _phase: DensePhase | MaskPhase | None
    # Whether SIGTERM has asked for a checkpoint in the phase that is under way, or just over.
    _was_preempted: bool

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return folder if self._phase is None else os.path.join(folder, FIRST_FOLDERS[self._phase.name])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, **({} if state_dict is None else {"state_dict": state_dict}))
        if self._phase is not None and self.args.should_save:
            folder = output_dir if output_dir is not None else self.args.output_dir
            if isinstance(self._phase, MaskPhase):
                save_mask_phase(self._phase, folder)
            else:
                save_dense_phase(self._phase, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self._was_preempted |= is_just_in_time(folder)
        if self.args.should_save:
            # The state comes last. An older one of the same step would call a half-written checkpoint complete.
            Path(folder, STATE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            # The callback does so as well, but after the trainer's state, and not under SIGTERM.
            save_state(self.model, output_dir)

    def _save_selection(self, adapter: str, first: str, trial: Any) -> None:
        """Keep adapter and heads at the boundary, for a run that stops before the second phase's first checkpoint."""
        if not self.args.should_save or (self.args.save_strategy == "no" and not self.args.enable_jit_checkpoint):
            return
        folder = os.path.join(self._get_output_dir(trial), FIRST_FOLDERS[first], SELECTION_FOLDER)
        with AtomicFolder(folder, overwrite=True, is_replaced=lambda name: True, doors=(SELECTION_FILE,)) as atomic:
            self.model.save_pretrained(os.fspath(atomic.staging), selected_adapters=[adapter])
            (atomic.staging / SELECTION_FILE).write_text(json.dumps({"adapter": adapter}), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._phase is not None:
            self._load_first_phase(self._phase, resume_from_checkpoint)
        elif model is None and (adapters := self._trained_adapters()):
            self._load_adapters(resume_from_checkpoint, adapters)
            if os.path.isfile(os.path.join(resume_from_checkpoint, STATE_FILE)):
                load_state(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, *([] if model is None else [model]))

    def _load_best_model(self) -> None:
        best, score = self.state.best_model_checkpoint, self.state.best_metric
        if self._phase is not None and best is not None:
            logger.info("Loading the best of the %s phase from %s (score: %s).", self._phase.name, best, score)
            self._load_first_phase(self._phase, best)
        elif (
            best is not None
            and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
            and (adapters := self._trained_adapters())
        ):
            logger.info("Loading the best adapter from %s (score: %s).", best, score)
            self._load_adapters(best, adapters)
        else:
            super()._load_best_model()

    def _load_first_phase(self, phase: DensePhase | MaskPhase, folder: str) -> None:
        if isinstance(phase, MaskPhase):
            check_mask_checkpoint(phase, folder)
            self._load_adapters(folder, [phase.adapter_name])
        else:
            load_dense_phase(phase, folder)

    def _trained_adapters(self) -> list[str]:
        """The adapters of ours that are active and trainable.

        The trainer's own loading takes the first active adapter for the only one, and so a frozen language adapter for
        the task's.
        """
        if not isinstance(self.model, PeftModel):
            return []
        return [name for name in self.model.active_adapters if self._trains(name)]

    def _trains(self, name: str) -> bool:
        config = self.model.peft_config.get(name)
        if isinstance(config, AdaSftConfig):
            return any(masked.trained.requires_grad for _, _, masked in iter_masked(self.model, name))
        deltas = iter_deltas(self.model, name) if isinstance(config, SparseConfig) else ()
        return any(delta.values.requires_grad for _, _, _, delta in deltas)

    def _needs_of_checkpoints(self) -> Needs:
        """What this run has to find in a checkpoint. FSDP and DeepSpeed write theirs in ways of their own."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(self.model, PeftModel):
            return Needs(training=False)
        adapters = tuple(self._trained_adapters() or self.model.active_adapters)
        files = []
        if any(reselector.adapter_name in adapters for reselector in iter_reselectors(self.model)):
            files.append(STATE_FILE)
        training = not self.args.save_only_model
        if training and getattr(self.accelerator, "scaler", None) is not None:
            files.append("scaler.pt")
        rank = self.args.process_index if self.args.world_size > 1 else None
        return Needs(adapters=adapters, files=tuple(files), training=training, rank=rank)

    def _load_selection(self, folder: str) -> None:
        self._load_adapters(folder, self._trained_adapters())

    def _load_adapters(self, folder: str, adapters: list[str]) -> None:
        known = [name for name in adapters if knows(folder, name)]
        for name in set(adapters) - set(known):
            logger.warning("adapter %r is not in %s: it starts afresh.", name, folder)
        loaded = {name: self._read_adapter(os.path.join(folder, folder_of(name))) for name in known}
        for name, tensors in loaded.items():
            set_peft_model_state_dict(self.model, tensors, adapter_name=name)

    def _read_adapter(self, folder: str) -> dict[str, Any]:
        with naming(folder):
            return load_peft_weights(folder, device="cpu")

    # ---- damaged files ---------------------------------------------------------------------------

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with naming(f"{checkpoint}/optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                check_moments(self.optimizer)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with naming(f"{checkpoint}/scaler.pt"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with naming(f"{checkpoint}/rng_state.pth"):
            super()._load_rng_state(checkpoint)

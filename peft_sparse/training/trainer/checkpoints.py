"""Checkpoints of a trainer whose training has phases: where they lie, and which adapters they bring back."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ...checkpoints.adapter_files import CONFIG_FILE
from ...files import AtomicFolder
from ...optim.other_states import refusing_ours
from ...tuners.common.adapter_config import active_adapters_of, carrier_of, carries_in_a_part
from ..phases.phase import Phase
from ..spiel.callback import STATE_FILE, adapters_with_state, load_state, save_state
from ..stacked_adapters import trains
from .completeness import STATE, Needs, check_moments, holds_adapter, naming
from .preemption import is_just_in_time
from .resume import SELECTION_FILE, SELECTION_FOLDER
from .stored_adapters import folders_of, load_adapters, save_adapter, saving_each

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
    _phase: Phase | None
    # Whether SIGTERM has asked for a checkpoint in the phase that is under way, or just over.
    _was_preempted: bool

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return folder if self._phase is None else os.path.join(folder, self._phase.folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with saving_each(self.model):
            super()._save(output_dir, **({} if state_dict is None else {"state_dict": state_dict}))
        folder = output_dir if output_dir is not None else self.args.output_dir
        if carries_in_a_part(self.model) and self.args.should_save:
            # What the trainer saves of the whole model has no adapters' configs.
            for name in active_adapters_of(carrier_of(self.model)):
                save_adapter(self.model, folder, name)
        if self._phase is not None and self.args.should_save:
            self._phase.save(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        self._was_preempted |= is_just_in_time(folder)
        if self.args.should_save:
            # The state comes last. An older one of the same step would call a half-written checkpoint complete.
            Path(folder, STATE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push adapters of other names than "default", too: the trainer's own takes along no folder of a checkpoint."""
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        will_push = self.args.hub_strategy != HubStrategy.END and (self.args.hub_always_push or not is_busy)
        if self.is_world_process_zero() and will_push:
            for folder in Path(checkpoint_folder).iterdir():
                if folder.is_dir() and holds_adapter(os.fspath(folder)):
                    beside = os.path.join(self.args.output_dir, folder.name)
                    with AtomicFolder(
                        beside, overwrite=True, is_replaced=lambda name: True, doors=(CONFIG_FILE,)
                    ) as atomic:
                        shutil.copytree(folder, atomic.staging, dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self._keeps_state():
            # The callback does so as well, but after the trainer's state, and not under SIGTERM.
            save_state(self.model, output_dir)

    def _keeps_state(self) -> bool:
        """Whether the checkpoints of the phase that is under way hold adapters, and the training state beside them."""
        return self._phase is None or self._phase.holds_adapter

    def _save_selection(self, adapter: str, kind: type[Phase], trial: Any) -> None:
        """Keep adapter and heads at the boundary, for a run that stops before the second phase's first checkpoint."""
        if not self.args.should_save or (self.args.save_strategy == "no" and not self.args.enable_jit_checkpoint):
            return
        folder = os.path.join(self._get_output_dir(trial), kind.folder, SELECTION_FOLDER)
        with AtomicFolder(folder, overwrite=True, is_replaced=lambda name: True, doors=(SELECTION_FILE,)) as atomic:
            if carries_in_a_part(self.model):
                self._save(os.fspath(atomic.staging))
            else:
                save_adapter(self.model, os.fspath(atomic.staging), adapter)
            (atomic.staging / SELECTION_FILE).write_text(json.dumps({"adapter": adapter}), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._phase is not None:
            self._load_phase(self._phase, resume_from_checkpoint)
        elif model is None and self._trained_adapters():
            self._load_trained(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, *([] if model is None else [model]))
        if not self._is_sharded():
            self._load_state(resume_from_checkpoint)

    def _load_state(self, folder: str | None) -> None:
        if folder is not None and self._keeps_state() and os.path.isfile(os.path.join(folder, STATE_FILE)):
            load_state(self.model, folder)

    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _load_phase(self, phase: Phase, folder: str) -> None:
        phase.load(folder)
        if phase.holds_adapter:
            self._load_around_adapters(folder)

    def _load_trained(self, folder: str) -> None:
        """Bring back the adapters that train, and all else of a model of which what carries them is but a part."""
        load_adapters(self.model, folder, self._trained_adapters())
        self._load_around_adapters(folder)

    def _load_around_adapters(self, folder: str) -> None:
        if carries_in_a_part(self.model):
            super()._load_from_checkpoint(folder)

    def _load_best_model(self) -> None:
        best, score = self.state.best_model_checkpoint, self.state.best_metric
        if self._phase is not None and best is not None:
            logger.info("Loading the best of the %s phase from %s (score: %s).", self._phase.name, best, score)
            self._load_phase(self._phase, best)
        elif best is not None and not self._is_sharded() and self._trained_adapters():
            logger.info("Loading the best adapter from %s (score: %s).", best, score)
            self._load_trained(best)
        else:
            super()._load_best_model()

    def _trained_adapters(self) -> list[str]:
        """The adapters that are active and trainable.

        The trainer's own loading takes the first active adapter for the only one, and so a frozen language adapter for
        the task's.
        """
        model = carrier_of(self.model)
        return [name for name in active_adapters_of(model) if trains(model, name)]

    def _needs_of_checkpoints(self) -> Needs:
        """What this run has to find in a checkpoint. FSDP and DeepSpeed write theirs in ways of their own."""
        model = carrier_of(self.model)
        if self._is_sharded() or not active_adapters_of(model):
            return Needs(training=False)
        adapters = folders_of(model, self._trained_adapters() or active_adapters_of(model))
        files = []
        if not adapters_with_state(model).isdisjoint(adapters):
            files.append(STATE_FILE)
        training = not self.args.save_only_model
        if training and getattr(self.accelerator, "scaler", None) is not None:
            files.append("scaler.pt")
        rank = self.args.process_index if self.args.world_size > 1 else None
        return Needs(adapters=adapters, files=tuple(files), training=training, rank=rank)

    def _load_selection(self, folder: str) -> None:
        self._load_trained(folder)

    # ---- damaged files ---------------------------------------------------------------------------

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        with naming(f"{checkpoint}/optimizer.pt or scheduler.pt"), refusing_ours(optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and not self._is_sharded():
                check_moments(self.optimizer)
        if self._is_sharded():
            # Not with the adapter: what loads these optimizers makes a step first, which a reselection would count.
            self._load_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with naming(f"{checkpoint}/scaler.pt"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with naming(f"{checkpoint}/rng_state.pth"):
            super()._load_rng_state(checkpoint)

"""Hyperparameter search over a training run of two phases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer

from ..phases.phase import Phase
from .phase_args import make_first_args

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class PhaseTrials(_Base):
    """What a trial sets and is judged by: the trainer's own arguments, and what the second phase reaches."""

    # The first phase that is under way.
    _phase: Phase | None

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if self._phase is not None and trial is not None:
            # What the user gave for this phase alone goes before what the trial gives for both.
            name = str(self._phase.args_name)
            make_first_args(self.args, getattr(self, name, None), name=name, in_place=True)
            self._train_batch_size = self.args.train_batch_size

    def _report_to_hp_search(self, trial: Any, step: int, metrics: dict[str, float]) -> None:
        if self._phase is None:
            super()._report_to_hp_search(trial, step, metrics)

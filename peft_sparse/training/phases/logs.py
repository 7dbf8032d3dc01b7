"""What a trainer whose training has phases adds to its logs and its progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

from ...tuners.sparse_ft.iteration import iter_deltas
from ..rates import warn_of_rate
from ..spiel.in_trainer import figures
from ..spiel.reselector import iter_reselectors
from .phase import Phase

if TYPE_CHECKING:
    from ..trainer.checkpoints import PhaseCheckpoints as _Base
else:
    _Base = object


class PhaseLogs(_Base):
    """The log of `TwoPhaseTraining`."""

    _phase: Phase | None
    _phase_name: str | None
    # The update up to which reselections are in the log.
    _logged_update = 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the name of the phase ("phase"), the L1 penalty ("l1_loss") and the figures of a reselection
        ("mean_age" and others) where there are such.
        """
        shown: dict[str, Any] = dict(logs)
        if self._phase_name is not None:
            shown["phase"] = self._phase_name
        if "loss" in logs:
            if (penalty := self._l1_loss()) is not None:
                shown["l1_loss"] = penalty
            shown.update(figures(self.model, self._logged_update))
            self._logged_update = self.state.global_step
        super().log(shown, *([] if start_time is None else [start_time]))
        # The caller's dictionary gets what the trainer adds to it (evaluation returns it), but for the name, which is
        # no number.
        logs.update({key: value for key, value in shown.items() if key != "phase"})

    def _l1_loss(self) -> float | None:
        if self._phase is not None:
            pulls = list(self._phase.pulls()) if self._phase.l1_coefficient else []
        else:
            deltas = [d for name in self._trained_adapters() for _, _, _, d in iter_deltas(self.model, name)]
            pulls = [pull for delta in deltas if delta.l1_coefficient for pull in delta.pulls()]
        return sum(pull.penalty() for pull in pulls) if pulls else None


class NamePhase(TrainerCallback):
    """Writes the phase's name at the progress bar, and warns of a learning rate that is far off."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not any(iter_reselectors(self._trainer.model)):  # those have a callback that every trainer calls
            warn_of_rate(self._trainer.model, kwargs.get("optimizer"))
        name = self._trainer._phase_name
        if name is None:
            return
        for callback in self._trainer.callback_handler.callbacks:
            bar: Any = getattr(callback, "training_bar", None)
            if hasattr(bar, "set_description"):
                bar.set_description(f"{name} phase")

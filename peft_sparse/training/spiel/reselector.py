"""SpIEL in any training loop: counts optimizer updates, watches gradients in windows, drops and regrows weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ...core.observer import current_pass, is_within_another
from ...core.sharded import whole
from ...errors import ConfigError
from ...optim.reindex import reindex, state_holders
from ...optim.step_scale import end_step
from ...optim.step_watch import Step, StepWatch
from ...selection.replacement import Candidates, Replacement
from ...selection.schedule import Schedule
from ...tuners.common.events import ON_START, announce
from ...tuners.sparse_ft.configs.spiel import SpielAGConfig, SpielConfig, SpielMAConfig
from ...tuners.sparse_ft.drivers import Driver, iter_drivers
from ...tuners.sparse_ft.iteration import iter_deltas
from ..distributed import check_same_supports, refuse_processes
from .changed_supports import ChangedSupports
from .dropping import choose_replacements, drop_scores
from .estimate import Estimate
from .gradient_tap import GradientTap, end_update, not_finite
from .grown_gradients import clip_factor, grown_gradients
from .history import Reselection, log_reselection, warn_without_candidates, warn_without_total
from .momentum_covers import MomentumCovers
from .resume_check import check_resumed
from .saved_state import check_state
from .updates import Updates, first_not_finite
from .weight_record import WeightRecord
from .window import estimates_of, is_clear, read_estimates, saved_estimates, tap_gradients


class Reselector(Driver):
    """Drives one SpIEL adapter. Made automatically when the adapter is added; an optimizer-step hook calls it.

    Args:
        model: the base model, with its sparse layers.
        adapter_name: the adapter.
        config: the model's copy of its config.

    Attributes:
        adapter_name, config: as given.
        deltas: {parameter name: delta} of the adapter.
        update: optimizer updates so far.
        total_steps: T, all updates of the run; None while it is unknown.
        max_grad_norm: what the training loop clips gradients to; None if it does not, or if that is unknown.
        history: what every reselection did, oldest first.
        is_restored: whether it is where `load_state_dict` put it.
    """

    def __init__(self, model: nn.Module, adapter_name: str, config: SpielConfig) -> None:
        self.adapter_name = adapter_name
        self.config = config
        found = list(iter_deltas(model, adapter_name))
        self.deltas = {name: delta for name, _, _, delta in found}
        self._places = {name: (layer, which) for name, layer, which, _ in found}
        self.update = 0
        self.total_steps = config.total_steps
        self.max_grad_norm = config.max_grad_norm
        self.history: list[Reselection] = []
        self.is_restored = False
        self._warned = False
        # The support to start from is random, unless somebody else sets another one: a load.
        self._random_versions = {name: delta.support_version for name, delta in self.deltas.items()}
        self._continues = False
        # The update after which a reselection was due that waits for clearer gradients.
        self._due: int | None = None
        self._record = WeightRecord(self.deltas, keeps_values=config.drop_by == "change_since_reselection")
        self._supports = ChangedSupports(self.deltas)
        self._taps: dict[str, GradientTap] = {}
        self._covers = MomentumCovers(self.deltas) if isinstance(config, SpielMAConfig) else None
        self._open_window()
        self._start()

    def _start(self) -> None:
        self._updates = Updates(self.adapter_name, self.deltas)
        self._ends_with_pass = False
        stepping.add(self)
        stepped.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_updates"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied model, or one from a file, reselects on its own, and goes on with the window that was open.
        vars(self).update(state)
        for name, tap in self._taps.items():
            self.deltas[name].observer = tap
        self._start()
        if not self._sleeps:
            announce(ON_START)

    # ---- the clock -----------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """When to reselect and how much, with the total number of updates as far as it is known."""
        return Schedule(
            reselection_steps=self.config.reselection_steps,
            estimation_steps=self.config.estimation_steps,
            initial_rate=self.config.initial_reselection_rate,
            kind=self.config.reselection_schedule,
            replace_all_first=self.config.replace_all_first and not self._continues and not self._was_loaded(),
            reselection_until=self.config.reselection_until,
            total_steps=self.total_steps,
        )

    def set_total_steps(self, total_steps: int) -> None:
        """Say how many updates the whole training has; `total_steps` of the config goes before it."""
        if self.config.total_steps is None and total_steps > 0:
            self.total_steps = total_steps
            if self._taps and not self.schedule.in_window(self.update + 1):
                self._close_window()

    def _was_loaded(self) -> bool:
        return any(self._random_versions.get(name) not in (None, d.support_version) for name, d in self.deltas.items())

    def begin_training(self, total_steps: int) -> None:
        """A trainer begins a run of so many updates. A second run goes on from the support of the first.

        Raises:
            ConfigError: several processes train in a way in which the support cannot change.
        """
        refuse_processes(self.adapter_name, self.config.budget, self.deltas)
        if self.update:
            self._continues = True
            self._record.begin_run(self.update)
            self.skip_to(0)
        elif not self.is_restored:
            self.begin_window()
        self.set_total_steps(total_steps)

    def skip_to(self, update: int) -> None:
        """Count as if `update` updates had been made, without the window that may be open then."""
        self._close_window()
        self.is_restored = False
        self.update, self._due = update, None
        self._open_window()

    def before_step(self, step: Step) -> None:
        """An optimizer begins a step.

        Raises:
            ConfigError: several optimizers share the adapter in a way that is not supported.
        """
        if self.is_asleep:
            return
        if self._updates.before(step):
            self._end_update(may_reselect=False)
        self._supports.before_step(self._updates.optimizers_of)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """An optimizer made a step: the gradients it saw are still there.

        Raises:
            ConfigError: several processes train in a way in which the support cannot change, or no optimizer ever holds
                the values, for DeepSpeed gives it flat copies of several parameters.
            SelectionError: the processes do not do the same, or the gradients are not finite.
        """
        if self.is_asleep:
            return
        refuse_processes(self.adapter_name, self.config.budget, self.deltas)
        names = self._updates.after(step, is_active=self._is_active())
        if names:
            if self.update == 0 and not self._continues:
                check_resumed(self.adapter_name, step.optimizer, [self.deltas[name] for name in names])
            what = f"update {self.update + 1} of adapter {self.adapter_name!r}"
            if (broken := first_not_finite(self.deltas, names)) is not None:
                raise not_finite(broken, what)
            if self._covers is not None:
                self._covers.after_step(step.optimizer, names)
            end_update([tap for name, tap in self._taps.items() if name in names], what=what)
        if step.enclosing:
            return  # the optimizer around this one has not done its part yet
        if current_pass() == -1:
            self._finish_update()
        elif names and not self._ends_with_pass:
            # An optimizer for each tensor, which steps as soon as its gradient is there.
            self._ends_with_pass = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish_pass)

    @torch.no_grad()
    def _finish_pass(self) -> None:
        self._ends_with_pass = False
        if is_within_another():
            raise ConfigError(
                f"the optimizers of adapter {self.adapter_name!r} step within the backward pass, and reentrant "
                "gradient checkpointing cuts that into pieces: use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        self._finish_update()

    def _finish_update(self) -> None:
        if self._updates.is_complete():
            self._end_update()

    @property
    def is_trainable(self) -> bool:
        """Whether the adapter is active, and its values are not frozen."""
        return self._is_active() and any(delta.held_values.requires_grad for delta in self.deltas.values())

    def _is_active(self) -> bool:
        layer, _ = next(iter(self._places.values()), (None, ""))
        return layer is not None and not layer.disable_adapters and self.adapter_name in layer.active_adapters

    @torch.no_grad()
    def _end_update(self, *, may_reselect: bool = True) -> None:
        self.update += 1
        self.is_restored = False
        schedule = self.schedule
        if schedule.selects_after(self.update):
            self._due = self.update
        if may_reselect and self._due is not None and (self._must_select(schedule) or self._is_clear(schedule)):
            if self.total_steps is None and not self._warned:
                self._warned = True
                warn_without_total(self.adapter_name, self.config.initial_reselection_rate)
            self._reselect(schedule)
            self._close_window()
            self._due = None
        if schedule.is_first_of_window(self.update + 1):
            self._open_window()
        self._supports.after_update(self._updates.optimizers())

    def _must_select(self, schedule: Schedule) -> bool:
        """Whether a reselection that is due cannot wait for clearer gradients: the next window or the end is near."""
        share = self.config.uncertain_share if isinstance(self.config, SpielAGConfig) else None
        is_last = self.total_steps is not None and self.update + 1 >= self.total_steps
        return share is None or is_last or schedule.is_first_of_window(self.update + 1)

    def _is_clear(self, schedule: Schedule) -> bool:
        wanted = {name: schedule.num_replaced(self._due, self.deltas[name].count) for name in self._taps}
        return is_clear(self._taps, wanted, uncertain_share=self.config.uncertain_share)

    def stop(self) -> None:
        """Leave the adapter as it is and never touch it again."""
        self._close_window()
        stepping.discard(self)
        stepped.discard(self)

    # ---- the window ----------------------------------------------------------------------------

    def begin_window(self) -> None:
        """Begin the window that is open anew, for the support that there is now; nothing outside of windows."""
        self._close_window()
        self._open_window()

    def _open_window(self, estimates: dict[str, Estimate] | None = None) -> None:
        if not isinstance(self.config, SpielAGConfig):
            return
        schedule, following = self.schedule, self.update + 1
        if estimates is None and not schedule.is_first_of_window(following):
            return
        end = schedule.window_end(following)
        replaces_all = end is not None and schedule.rate(end) == 1
        self._taps = tap_gradients(
            self.config, self.deltas, self._places, replaces_all=replaces_all, estimates=estimates or {}
        )

    def _close_window(self) -> None:
        for name in self._taps:
            self.deltas[name].observer = None
        self._taps = {}

    # ---- the reselection -----------------------------------------------------------------------

    def _reselect(self, schedule: Schedule) -> None:
        # A gradient that another optimizer is about to use must not be wiped away.
        candidates = {name: c for name, c in self._candidates(schedule).items() if not self._updates.waits(name)}
        if not candidates:
            overflowed = any(tap.met_infinity for tap in self._taps.values())
            warn_without_candidates(self.adapter_name, self.update, overflowed=overflowed)
            return
        values = {name: whole(d.held_values).to(d.indices.device) for name, d in self.deltas.items()}
        replacements = choose_replacements(
            {name: self.deltas[name].indices for name in candidates},
            {name: drop_scores(values[name], self._record.last_values(name)) for name in candidates},
            candidates,
            budget=self.config.budget,
            num_replaced=lambda count: schedule.num_replaced(self._due, count),
        )
        total = sum(delta.count for delta in self.deltas.values())
        mean_abs = sum(float(v.abs().sum(dtype=torch.float64)) for v in values.values()) / total
        factor = clip_factor(
            self.max_grad_norm,
            self._updates.optimizers(),
            deltas=self.deltas,
            replacements=replacements,
            estimates=estimates_of(self._taps),
        )
        for name, replacement in replacements.items():
            self._apply(name, replacement, values[name], factor)
        self._supports.note()
        supports = {name: delta.indices for name, delta in self.deltas.items()}
        check_same_supports(supports, when=f"after update {self.update} of adapter {self.adapter_name!r}")
        replaced = sum(r.num_grown for r in replacements.values())
        self.history.append(Reselection(self.update, replaced / total, self._record.mean_age(self.update), mean_abs))
        log_reselection(self.adapter_name, self.history[-1], total=total)

    def _candidates(self, schedule: Schedule) -> dict[str, Candidates]:
        if self._covers is not None:
            wanted = {name: schedule.num_replaced(self._due, d.count) for name, d in self.deltas.items()}
            if self.config.budget == "global":
                # Any tensor might win all of them.
                wanted = dict.fromkeys(wanted, sum(wanted.values()))
            return self._covers.candidates(wanted)
        squared = self.config.grow_by == "fisher"
        return {
            name: Candidates(estimate.indices[estimate.nominated], self._taps[name].scores(squared=squared))
            for name, estimate in estimates_of(self._taps).items()
        }

    def _apply(self, name: str, replacement: Replacement, values: Tensor, factor: float) -> None:
        delta = self.deltas[name]
        if self._covers is not None:
            gradients = self._covers.grown_gradients(name, replacement.new_indices)
        else:
            gradients = grown_gradients(estimates_of(self._taps)[name], replacement, clip_factor=factor)
        values = replacement.carry(values)
        self._record.replace(name, replacement, values, update=self.update)
        for optimizer in state_holders(self._updates.optimizers_of(delta.held_values), delta.held_values):
            reindex(optimizer, delta.held_values, replacement, gradients)
        delta.set_support(replacement.indices, values)
        self._record.replaced(name)
        self._random_versions[name] = delta.support_version
        if self.config.counts is not None:
            self.config.counts[name] = delta.count

    # ---- resuming ------------------------------------------------------------------------------

    def grown_at(self) -> dict[str, Tensor]:
        """{parameter: [k] the update after which each weight was last grown; 0 for those of the first support}."""
        return {name: self._record.grown_at(name).clone() for name in self.deltas}

    def state_dict(self) -> dict[str, Tensor]:
        """All that a run needs to go on exactly as if it had not stopped, beside adapter and optimizer.

        Taken between two updates, as checkpoints are. Tensors only, by names that `load_state_dict` knows.
        """
        state = {"update": torch.tensor(self.update), "continues": torch.tensor(self._continues or self._was_loaded())}
        if self._due is not None:
            state["due"] = torch.tensor(self._due)
        state |= self._record.state_dict() | saved_estimates(self._taps)
        if self._covers is not None:
            state.update({f"covers.{key}": tensor for key, tensor in self._covers.state_dict().items()})
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where `state_dict` was taken; the adapter itself has to be loaded before.

        Raises:
            FormatError: the state is of another adapter, or damaged; nothing is changed then.
        """
        check_state(state, self.deltas, name="training state")
        self._close_window()
        self.update, self.is_restored = int(state["update"]), True
        self._due = int(state["due"]) if "due" in state else None
        self._continues = bool(state["continues"])
        self._random_versions = {name: delta.support_version for name, delta in self.deltas.items()}
        self._record.load_state_dict(state)
        if self._covers is not None:
            self._covers.load_state_dict(
                {k.removeprefix("covers."): v for k, v in state.items() if k.startswith("covers.")},
                updates=self.update,
            )
        self._open_window(read_estimates(state, self.deltas) or None)


def _before_step(watched: tuple[Reselector, ...], step: Step) -> None:
    for reselector in watched:
        reselector.before_step(step)


def _after_step(watched: tuple[Reselector, ...], step: Step) -> None:
    # Once the support has changed, what a step changed could not be told any more.
    end_step(step)
    for reselector in watched:
        reselector.after_step(step)


# The base model holds its reselectors, so one that is dropped takes them along.
stepping: StepWatch[Reselector] = StepWatch(register_optimizer_step_pre_hook, _before_step)
stepped: StepWatch[Reselector] = StepWatch(register_optimizer_step_post_hook, _after_step)


def iter_reselectors(model: nn.Module) -> Iterator[Reselector]:
    """The reselectors that drive adapters of a model."""
    return (driver for driver in iter_drivers(model) if isinstance(driver, Reselector))

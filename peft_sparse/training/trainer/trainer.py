"""Trainers for sparse fine-tuning: any Hugging Face trainer, going through the two phases of LT-SFT or of Ada-SFT."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, enable_full_determinism, set_seed
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput, find_executable_batch_size

from ...checkpoints.push import update_cards
from ...errors import ConfigError, FormatError
from ...tuners.bottleneck.iteration import iter_layers as iter_bottleneck_layers
from ...tuners.common.adapter_config import peft_configs
from ...tuners.common.base_model import base_model_of
from ...tuners.sparse_ft.iteration import iter_layers
from ...tuners.sparse_ft.resident import resident
from ...tuners.sparse_ft.unselected import open_phase, set_open_phase
from ..decay import decay_deltas_only
from ..derived import derived_trainer, takes_argument
from ..frozen import refuse_frozen
from ..merged import refuse_merged
from ..phases.logs import NamePhase, PhaseLogs
from ..phases.phase import PHASES, SECOND, SELECTION, Phase
from ..phases.registry import phase_before
from ..spiel.in_trainer import optimizer_for
from ..stacked_adapters import StackedAdaptersCallback
from .checkpoints import PhaseCheckpoints
from .phase_args import make_first_args
from .preemption import listen, listening, take_request
from .resume import ResumePoint, find_resume_point, is_finished
from .trials import PhaseTrials

logger = logging.getLogger(__name__)


class TwoPhaseTraining(PhaseLogs, PhaseCheckpoints, PhaseTrials):
    """What `sparse_trainer` adds to a trainer class.

    `train()` looks at the active adapter. If it is a lottery ticket without weights, the dense phase, the selection,
    the rewind and the sparse phase run one after the other; if it is one of Ada-SFT that has yet to learn its masks,
    the mask phase and the weight phase do (see `start_weight_phase`). If gradients are to choose its weights
    (`OneShotConfig`), they do so over the first batches, and the sparse phase follows. Any other model trains as usual,
    only in `resident` mode. It is a `PeftModel`, or one of transformers with adapters by its own `add_adapter`, also of
    other types: checkpoints hold all that are active, and bring back those that train. Or a module of the user's own of
    which such a model is a part, whose checkpoints hold both the whole and the adapters.

    Each phase has an optimizer, a scheduler, a length and checkpoints of its own, begins from `args.seed` (so the
    sparse phase sees the data in the order in which Rand-SFT with the same seed would), and names itself in logs (key
    "phase") and progress bar. Checkpoints of the dense phase lie in `_dense/checkpoint-N` in the output folder, the
    selection in `_dense/selection`, and those of the sparse phase in `checkpoint-N` as usual; `resume_from_checkpoint`
    finds the phase. `load_best_model_at_end` works in each phase: the best dense weights are what the selection looks
    at. A callback that stops the first phase (early stopping) ends it: weights are selected from what it has learnt by
    then, and the log says how many of its steps were made. SIGTERM under `enable_jit_checkpoint` stops the whole run,
    which can be resumed. The dense folder may be deleted once the sparse phase has a checkpoint. With Ada-SFT the
    phases are called "mask" and "weights" and the folder is `_mask`; the best masks are the ones that get fixed.

    Args:
        args, kwargs: of the trainer class.
        dense_args: {field: value}, where the training arguments of the dense phase differ from `args`: learning_rate,
            max_steps, num_train_epochs, lr_scheduler_type, ... Weight decay is 0 in the dense phase unless it is set
            here.
        mask_args: the same for the mask phase of Ada-SFT.

    Attributes:
        dense_state: TrainerState at the end of the dense phase (its `log_history`, ...); None before it, or if it was
            not run here.
        dense_output: what the dense phase's training returned; likewise.
        mask_state, mask_output: the same of the mask phase of Ada-SFT.

    Raises:
        ConfigError: `dense_args` or `mask_args` names an unknown field, or one that holds for both phases.
    """

    # The trainer's own, which the phases exchange.
    args: Any
    model_init: Any
    _train_batch_size: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._phase: Phase | None = None
        self._phase_name: str | None = None
        self._was_preempted = False
        if "peft_config" in kwargs and not takes_argument(type(self), "peft_config"):
            raise ConfigError(
                f"{type(self).__name__} takes a model that has its adapter: model=get_peft_model(model, config). "
                "peft_config=... is an argument of TRL's trainers, as SparseSFTTrainer."
            )
        own = {kind.args_name: kwargs.pop(kind.args_name, None) for kind in PHASES.values() if kind.args_name}
        for kind in PHASES.values():
            if kind.trains:
                self._remember(kind, None, None)
        vars(self).update(own)
        super().__init__(*args, **kwargs)
        for kind in PHASES.values():
            if kind.args_name:
                make_first_args(self.args, own[kind.args_name], name=kind.args_name)
                kind.warn_of_args(own[kind.args_name] or {})
        self.add_callback(NamePhase(self))
        self.remove_callback(StackedAdaptersCallback)

    # ---- the run -------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train: in two phases if the active adapter has its first one before it, after the selection if gradients are
        to choose its weights.

        Args:
            resume_from_checkpoint: a checkpoint of either phase; True for the last one that is complete.
            trial: of a hyperparameter search.
            ignore_keys_for_eval: outputs of the model that evaluation leaves out.

        Returns:
            What the trainer class returns, for the second phase; for the first one if SIGTERM ended it (see
            `enable_jit_checkpoint`), in which case the second has not begun, and `state` is that of its step 0.

        Raises:
            ConfigError: the two phases cannot run under this trainer's settings; see `start_dense_phase` for those of
                the model. Or adapters that are to be trained are merged or frozen.
            SelectionError: fewer weights moved in the dense phase than the adapter asks for.
        """
        options = _given(trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)
        with self._model_made_once(trial), listening(self):
            refuse_merged(self.model)
            refuse_frozen(self.model, self.optimizer)
            # TRL has cast them if the base is quantised; DDP has to find them as they train.
            for _, layer in (*iter_layers(self.model), *iter_bottleneck_layers(self.model)):
                layer.keep_dtypes()
            found = phase_before(self.model)
            kind = None if found is None else found[1]
            if kind is not None and kind.trains:
                self._check_two_phases(kind)
            point = find_resume_point(
                self._get_output_dir(trial),
                resume_from_checkpoint,
                None if kind is None else kind.name,
                needs=self._needs_of_checkpoints(),
            )
            if found is None:
                return self._train_second(None, point, options)
            adapter, kind = found
            output = None
            if point is None or point.phase not in (SELECTION, SECOND):
                output = self._train_first(adapter, kind, point, trial, options)
                if self._stops_before_second(kind):
                    return output or TrainOutput(0, 0.0, {})
            return self._train_second(kind.next_name, point, options)

    def _train_first(
        self, adapter: str, kind: type[Phase], point: ResumePoint | None, trial: Any, options: dict[str, Any]
    ) -> TrainOutput | None:
        """The first phase and the selection. Whatever leaves this method, the base weights are where they were."""
        if point is not None and (point.phase != kind.name or not kind.trains):
            raise FormatError(
                f"resume_from_checkpoint: {point.path} is of a {point.phase} phase, which adapter {adapter!r} "
                f"({type(peft_configs(self.model)[adapter]).__name__}) does not have."
            )
        output = None
        with ExitStack() as around:
            phase = around.enter_context(kind.begin(self, adapter))
            if kind.trains:
                around.enter_context(self._named(phase.name))
                around.enter_context(self._with_args_of(phase))
                logger.info("%s phase: %d targeted weights", phase.name, phase.numel)
                output = self._run_phase(point.path if point is not None else None, options)
                self._remember(kind, output, self.state)
                # Its moments are two copies of the targets; what comes next should not have to fit beside them.
                self._drop_optimizer()
                self.accelerator.free_memory()
                if self._was_preempted:
                    return output
                phase.select()
            else:
                # What a trial sets holds for the selection, too: its batches, its seed.
                self._hp_search_setup(trial)
                self._select_with_fitting_batches(phase)
        self._save_selection(adapter, kind, trial)
        return output

    def _select_with_fitting_batches(self, phase: Phase) -> None:
        """Select where nothing trains; under `auto_find_batch_size` with smaller batches if memory runs out."""
        batch_size = self._train_batch_size

        def select(batch_size: int) -> None:
            self._train_batch_size = batch_size
            self._seed()
            phase.select()

        try:
            find_executable_batch_size(select, batch_size, self.args.auto_find_batch_size)()
        finally:
            self._train_batch_size = batch_size

    def _remember(self, kind: type[Phase], output: TrainOutput | None, state: TrainerState | None) -> None:
        """What a phase's training returned, and the trainer's state after it, as attributes with the phase's name."""
        vars(self).update({f"{kind.name}_output": output, f"{kind.name}_state": state})

    def _stops_before_second(self, kind: type[Phase]) -> bool:
        """Whether SIGTERM came in the first phase, or while weights were selected. A later run goes on from there."""
        if not self._was_preempted and not take_request(self):
            return False
        logger.warning(
            "SIGTERM: the %s phase does not begin. train(resume_from_checkpoint=True) goes on from the checkpoint.",
            kind.next_name,
        )
        self.state = TrainerState(
            is_local_process_zero=self.is_local_process_zero(), is_world_process_zero=self.is_world_process_zero()
        )
        return True

    def _train_second(self, name: str | None, point: ResumePoint | None, options: dict[str, Any]) -> TrainOutput:
        """The second phase; or, without a name, the only one."""
        checkpoint = point.path if point is not None and point.phase == SECOND else None
        if point is not None and point.phase == SELECTION:
            self._load_selection(point.path)
        # On several GPUs of one process `nn.DataParallel` copies the model, and nothing is written into copies.
        with nullcontext() if self.args.n_gpu > 1 else resident(self.model):
            if name is None:
                return self._run_phase(checkpoint, options)
            self._drop_optimizer()
            with self._named(name):
                self._seed()
                return self._run_phase(checkpoint, options)

    def _run_phase(self, checkpoint: str | None, options: dict[str, Any]) -> TrainOutput:
        """The trainer class's own training, which says so if it ends early."""
        self._was_preempted = False
        try:
            output = super().train(**_given(resume_from_checkpoint=checkpoint), **options)
        finally:
            listen(self)
        if self._phase_name is not None and not is_finished(self.state):
            logger.warning(
                "the %s phase ended after %d of %d steps%s",
                self._phase_name,
                self.state.global_step,
                self.state.max_steps,
                ": SIGTERM" if self._was_preempted else ", for a callback or the data stopped it",
            )
        return output

    @contextmanager
    def _with_args_of(self, phase: Phase) -> Iterator[None]:
        """The trainer with the first phase's arguments and checkpoints."""
        args, batch_size = self.args, self._train_batch_size
        self.args = make_first_args(args, getattr(self, str(phase.args_name), None), name=str(phase.args_name))
        self._train_batch_size = self.args.train_batch_size
        self._phase = phase
        # Where callbacks see that the adapter is in its phase; dense and mask phases say so themselves.
        base = base_model_of(self.model)
        is_marked_here = open_phase(base) is None
        if is_marked_here:
            set_open_phase(base, phase)
        self._drop_optimizer()
        self._seed()
        try:
            yield
        finally:
            self._phase = None
            if is_marked_here:
                set_open_phase(base, None)
            self.args, self._train_batch_size = args, batch_size
            self._drop_optimizer()

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        self._phase_name = name
        logger.info("%s phase begins", name)
        try:
            yield
        finally:
            self._phase_name = None

    @contextmanager
    def _model_made_once(self, trial: Any) -> Iterator[None]:
        """Call `model_init` here and not in each of the two phases, where it would throw the first one's selection
        away."""
        model_init = self.model_init
        if model_init is not None:
            self._seed()
            self.model = self.call_model_init(trial)
            if self.place_model_on_device:
                self._move_model_to_device(self.model, self.args.device)
            self._drop_optimizer()
            self.model_init = None
        try:
            yield
        finally:
            self.model_init = model_init

    def _seed(self) -> None:
        if self.args.full_determinism:
            enable_full_determinism(self.args.seed)
        else:
            set_seed(self.args.seed)

    def _drop_optimizer(self) -> None:
        """Forget optimizer, scheduler and wrappers: they belong to the parameters that were trainable until now."""
        self.optimizer = self.lr_scheduler = None
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
        self.model_wrapped = self.model

    # ---- what can run --------------------------------------------------------------------------------

    def _check_two_phases(self, kind: type[Phase]) -> None:
        for other in PHASES.values():
            if other.args_name in (None, kind.args_name) or getattr(self, other.args_name, None) is None:
                continue
            if kind.args_name is None or getattr(self, kind.args_name, None) is None:
                own = f": {kind.args_name}={{...}}" if kind.args_name else ", which takes no arguments of its own"
                raise ConfigError(
                    f"{other.args_name} is for a {other.name} phase, and the active adapter begins with a {kind.name} "
                    f"phase{own}"
                )
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise ConfigError(
                "optimizers= gives one optimizer, and each phase trains other parameters with an optimizer of its own. "
                "Give optimizer_cls_and_kwargs=(class, {...}), or override create_optimizer."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                f"fsdp and deepspeed shard the weights that the {kind.name} phase works on. Run it under DDP, or in "
                "one process."
            )
        kind.refuse(self)

    # ---- the loop ------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        # Resumed where a phase ended in the middle of an epoch, the trainer would take one step more before it noticed.
        if is_finished(self.state):
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # ---- adapters that reselect ----------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The trainer's optimizer; the one that SpIEL is made with where the arguments leave it open.

        Weight decay acts on the values of sparse deltas alone: see `parameter_groups`.
        """
        chosen = self.optimizer_cls_and_kwargs
        if self.optimizer is None and chosen is None:
            self.optimizer_cls_and_kwargs = optimizer_for(self.model, self.args)
        is_ours = self.optimizer is None and self._phase is None
        try:
            optimizer = super().create_optimizer(*([] if model is None else [model]))
        finally:
            self.optimizer_cls_and_kwargs = chosen
        if is_ours:
            decay_deltas_only(optimizer, self.model if model is None else model)
        return optimizer

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The trainer's model card, with this library's part in it."""
        super().create_model_card(*args, **kwargs)
        if self.args.should_save:
            update_cards(self.args.output_dir)


def _given(**options: Any) -> dict[str, Any]:
    """Those options that somebody gave. An override of a user's trainer need not know the others."""
    return {name: value for name, value in options.items() if value is not None}


@functools.cache
def sparse_trainer(trainer_class: type[Trainer]) -> type[Any]:
    """A trainer class with LT-SFT's two phases in its `train`; see `TwoPhaseTraining` for what that adds.

    Args:
        trainer_class: `transformers.Trainer` or a class derived from it: TRL's, or your own.

    Returns:
        A class derived from both, called "Sparse" and the class's name; the same one for the same argument.

    Raises:
        ConfigError: not a trainer class.
    """
    return derived_trainer(trainer_class, TwoPhaseTraining, prefix="Sparse")


SparseTrainer = sparse_trainer(Trainer)


def __getattr__(name: str) -> Any:
    # TRL is optional and slow to import.
    if name == "SparseSFTTrainer":
        try:
            from trl import SFTTrainer
        except ModuleNotFoundError as error:
            raise ImportError(f"SparseSFTTrainer needs TRL ({error}): pip install 'peft-sparse[trl]'") from error
        return sparse_trainer(SFTTrainer)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

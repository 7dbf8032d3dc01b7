"""Configs of the methods whose support changes while training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ....checks import check_one_of, check_share, check_whole, is_finite, is_number
from ....errors import ConfigError
from ....selection.criteria import CRITERIA
from ....selection.schedule import KINDS, Schedule
from ...common.config import Stage
from .base import CHANCE, GRADIENTS, SparseConfig, method_name

RANDOM = "random"
# Criteria that a position has on its own, whatever the others of its tensor are.
GROW_BY = ("gradient", "fisher", "weight_times_gradient", "gradient_on_small_weights")
DROP_BY = ("delta", "change_since_reselection")


@dataclass
class SpielConfig(SparseConfig):
    """What SpIEL-AG and SpIEL-MA share: weights are dropped and regrown while training, at first random ones.

    Every `reselection_steps` optimizer updates the weights that changed least are reset and frozen, and as many others
    unfrozen in their place. It happens automatically in any training loop; memory is linear in the number of tuned
    weights. SpIEL-MA is published with the optimizer SM3, which `SparseTrainer` takes unless told otherwise; a loop of
    your own gives it the adapter's deltas: `SM3(parameters, deltas=[d for *_, d in iter_deltas(model)])`.

    Args:
        seed: of the random support to start from, which also depends on the method, `task_type` and the adapter's name:
            see `RandConfig`.
        initial_support: "random", the authors' choice, or the name of a criterion of gradients ("gradient", "fisher",
            ...; see `OneShotConfig`), by which the support to start from is chosen over the first batches, before
            training: by `SparseTrainer`, or `select_by_gradients(model, batches)` in a loop of your own. None of it is
            then replaced as a whole.
        selection_batches, selection_passes: of that selection, as in `OneShotConfig`.
        reselection_steps: S, updates from one reselection to the next.
        estimation_steps: gamma, updates over which gradients are estimated before a reselection, 1 <= gamma <= S. The
            first reselection comes after update gamma, the others every S updates from there.
        initial_reselection_rate: xi in (0, 1], the share of weights to replace at the beginning; it falls to 0.
        reselection_schedule: how it falls: "linear" xi (1 - t/T) or "cosine" xi/2 (1 + cos(pi t/T)).
        drop_by: "delta" drops the weights that differ least from their pretrained values (the authors' code, and the
            thesis's text), "change_since_reselection" those that moved least since the last one (its Algorithm 2).
        replace_all_first: replace every weight at the first reselection, for the support to start from is random.
        reselection_until: share of training after which the support stays as it is, in (0, 1].
        total_steps: T, updates in all of training; None takes the trainer's.
        max_grad_norm: what the training loop clips the norm of the gradients to; None takes the trainer's. Moments of
            grown weights are seeded with it, for larger gradients will be clipped harder.

    Source: Ansell et al. 2024, arXiv:2401.16405; thesis sections 7.3.1 and 7.3.2, appendix E.2. Differs from the
    authors' code in: windows of exactly gamma updates, no reselection after the last update, replacement of the first
    support under the cosine schedule too, and `density` counts the targets (theirs the model: `density_of="model"`).
    """

    seed: int = field(default=0, metadata={"help": "Seed of the random support to start from."})
    initial_support: str = field(
        default="random", metadata={"help": "The support to start from: 'random', or a criterion of gradients."}
    )
    selection_batches: int = field(default=8, metadata={"help": "Batches that choose the support to start from."})
    selection_passes: int = field(default=4, metadata={"help": "Parts of the targets that are scored one by one."})
    reselection_steps: int = field(default=20, metadata={"help": "Updates from one reselection to the next."})
    estimation_steps: int = field(default=5, metadata={"help": "Updates over which gradients are estimated."})
    initial_reselection_rate: float = field(default=0.2, metadata={"help": "Share of weights to replace at first."})
    reselection_schedule: str = field(default="linear", metadata={"help": "How the share falls: 'linear' or 'cosine'."})
    drop_by: str = field(default="delta", metadata={"help": "What is weak: 'delta' or 'change_since_reselection'."})
    replace_all_first: bool = field(default=True, metadata={"help": "Replace the whole random support at first."})
    reselection_until: float = field(default=1.0, metadata={"help": "Share of training with reselection."})
    total_steps: int | None = field(default=None, metadata={"help": "Updates in all of training."})
    max_grad_norm: float | None = field(default=None, metadata={"help": "What the loop clips gradients to."})

    own_optimizer: ClassVar[str] = "sparse_adamw"
    grows_weights: ClassVar[bool] = True

    @property
    def selected_by(self) -> str:  # type: ignore[override]
        """Whether the support to start from is random, or gradients have to be seen first."""
        return CHANCE if self.initial_support == RANDOM else GRADIENTS

    @property
    def criterion(self) -> str:
        """The criterion of the support to start from."""
        return self.initial_support

    def __post_init__(self) -> None:
        known = [RANDOM, *(name for name, criterion in CRITERIA.items() if criterion.needs_gradients)]
        check_one_of("initial_support", self.initial_support, known)
        super().__post_init__()
        check_whole("seed", self.seed, least=0)
        for name in ("initial_reselection_rate", "reselection_until"):
            check_share(name, getattr(self, name), way_out="It is a share, not a count.")
        for name in ("selection_batches", "selection_passes"):
            check_whole(name, getattr(self, name), least=1)
        check_one_of("reselection_schedule", self.reselection_schedule, KINDS)
        # The rest of the calendar is checked where it lives.
        Schedule(
            reselection_steps=self.reselection_steps,
            estimation_steps=self.estimation_steps,
            total_steps=self.total_steps,
        )
        check_one_of("drop_by", self.drop_by, DROP_BY)
        if self.max_grad_norm is not None and not (is_finite(self.max_grad_norm) and self.max_grad_norm > 0):
            raise ConfigError(f"max_grad_norm must be a finite number > 0 or None, got {self.max_grad_norm!r}.")


@method_name("spiel_ag")
@dataclass
class SpielAGConfig(SpielConfig):
    """SpIEL-AG: grow the weights with the largest gradients, averaged over the estimation window.

    Args:
        candidates_per_weight: how many growth candidates are watched over a window, per tuned weight of the tensor;
            they are the largest gradients of its first micro-batch. With 1.0 (the choice of the authors) the first,
            full replacement takes all of them.
        nomination_updates: n in [0, `estimation_steps`], over how many updates of a window the candidates are chosen:
            those whose gradients' sum over n whole updates, with all their micro-batches, is largest among twice as
            many that are tracked meanwhile. 0, the authors' choice, takes the largest of the first micro-batch alone:
            on SmolLM2-135M 38 % of those are among the largest over 8 batches. Costs a dense gradient, a tensor at a
            time, in the n updates.
        grow_by: what candidates are nominated and grown by: "gradient" (the paper's), "fisher" (mean squared gradient),
            "weight_times_gradient" or "gradient_on_small_weights", as `OneShotConfig` has them.
        uncertain_share: lets a window go on beyond `estimation_steps`, at most to the next one, until the candidates
            whose mean gradient lies within two standard errors of the cut between grown and refused are at most this
            share of the grown ones. None ends every window after `estimation_steps`, as the authors do. Proposed in
            thesis section 7.6.

    The best settings of the thesis (its Table 7.1: two epochs of 50,000 rows in batches of 128, linear decay after a
    warm-up over 3 %): `equivalent_rank=64` and weight decay 30 on deltas alone, at a learning rate of 1e-4 for Llama 2
    of 7B and 1e-5 for 13B. `weight_decay=30.0` of the training arguments acts on them alone through any trainer, and
    `parameter_groups(model, weight_decay=30.0)` in a loop of your own.

    Source: thesis section 7.3.1, Algorithm 2.
    """

    method: str = field(default="spiel_ag", metadata={"help": "How the weights to tune are chosen."})
    candidates_per_weight: float = field(default=1.0, metadata={"help": "Growth candidates per tuned weight."})
    nomination_updates: int = field(
        default=0, metadata={"help": "Updates over which candidates are chosen; 0 for the first micro-batch alone."}
    )
    grow_by: str = field(default="gradient", metadata={"help": "The criterion of growth: 'gradient', 'fisher', ..."})
    uncertain_share: float | None = field(
        default=None, metadata={"help": "End a window when at most this share of the grown weights is uncertain."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_finite(self.candidates_per_weight) and self.candidates_per_weight >= 1):
            raise ConfigError(
                f"candidates_per_weight must be a finite number >= 1, got {self.candidates_per_weight!r}."
            )
        check_whole("nomination_updates", self.nomination_updates, least=0)
        if self.nomination_updates > self.estimation_steps:
            raise ConfigError(
                f"nomination_updates must be at most estimation_steps ({self.estimation_steps}), got "
                f"{self.nomination_updates}."
            )
        check_one_of("grow_by", self.grow_by, GROW_BY)
        if self.uncertain_share is not None and self.grow_by != "gradient":
            raise ConfigError(
                f"uncertain_share is about mean gradients: it needs grow_by='gradient', got {self.grow_by!r}."
            )
        if self.uncertain_share is not None:
            if not is_number(self.uncertain_share) or not 0 < self.uncertain_share < 1:
                raise ConfigError(f"uncertain_share must be in (0, 1) or None, got {self.uncertain_share!r}.")
            if self.estimation_steps < 2:
                raise ConfigError("uncertain_share needs estimation_steps >= 2: one gradient has no standard error.")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Ordinary updates, and those of a window in which gradients are estimated."""
        return (*super().stages, Stage("estimating gradients", watches_gradients=True))


@method_name("spiel_ma")
@dataclass
class SpielMAConfig(SpielConfig):
    """SpIEL-MA: grow the weights whose row and column had the largest gradients, by the accumulators of SM3.

    The accumulators are those of the optimizer if it is `peft_sparse.SM3`, and kept on the side under any other. There
    the second moments of grown weights start from what they estimate, and the first from zero.

    The best settings of the thesis (its Table 7.1, as for `SpielAGConfig`), with SM3: `equivalent_rank=64`, a learning
    rate of 1e-3 and weight decay 0.3 for Llama 2 of 7B, 4e-4 and none for 13B.

    Any weight may grow that is not tuned before the reselection: one that was just dropped stays out until the next, as
    in the authors' code. The thesis's Algorithm 3 drops first and then grows the best of all, so that a dropped weight
    with a large estimate would come back at once, at zero.

    Source: thesis section 7.3.2, equation 7.7 and Algorithm 3.
    """

    method: str = field(default="spiel_ma", metadata={"help": "How the weights to tune are chosen."})

    own_optimizer: ClassVar[str] = "sm3"

"""Configs of the methods whose support is chosen once, before training."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ....checks import check_one_of, check_whole, is_number
from ....errors import ConfigError
from ....selection.criteria import CALLABLE, Criterion, check_criterion, criterion_name, resolve_criterion
from .base import CHANCE, GIVEN, GRADIENTS, WEIGHTS, SparseConfig, method_name

DRAWS = ("exact", "bernoulli")


@method_name("rand")
@dataclass
class RandConfig(SparseConfig):
    """Rand-SFT: tune weights drawn uniformly at random, exactly as many as asked for.

    The SC-SFT report draws over all tensors together (`budget="global"`) and trains 14.1 million weights of XLM-R base
    at a learning rate of 2e-5: `num_weights=14_155_776, target_modules="all"`, or without the embeddings
    `exclude_modules=r".*embed.*"` with it. A hundredth of the weights at a hundred times the rate
    (`num_weights=141_557`, 2e-3) loses little in most of its languages: F1 0.752 against 0.791 in the mean of seven.

    Args:
        seed: the support is a function of this number, the method, `task_type`, the density (or number), the adapter's
            name and the parameters' names alone. Adapters to be added up must differ in one of these: two language
            adapters that are both called "default" need seeds of their own, or else they change the same weights.
        draw: "exact" draws as many weights as were asked for; "bernoulli" draws each weight independently, with the
            probability that gives as many in the mean, so that `counts` tells how many it were.

    Source: the random baseline of Ansell et al. 2022, arXiv:2110.07560, section 4, and of the SC-SFT report, sections
    3.5 and 4.1.4. The report writes Bernoulli(p), its code draws exactly K without replacement, and leaves embeddings
    out by name ("embedding").
    """

    method: str = field(default="rand", metadata={"help": "How the weights to tune are chosen."})
    seed: int = field(default=0, metadata={"help": "Seed of the random support."})
    draw: str = field(default="exact", metadata={"help": "'exact' or 'bernoulli': as many as asked, or in the mean."})

    selected_by: ClassVar[str] = CHANCE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("seed", self.seed, least=0)
        check_one_of("draw", self.draw, DRAWS)


@method_name("one_shot")
@dataclass
class OneShotConfig(SparseConfig):
    """Tune the weights that score best by a criterion, chosen once.

    Criteria of the weights alone choose when the adapter is made. Those of gradients choose before training, from the
    first batches: `SparseTrainer` (or `sparse_trainer(YourTrainer)`) does it automatically, and
    `select_by_gradients(model, batches)` in a loop of your own; until then the adapter holds no weight. The default
    budget is one joint selection over all targets; Super-Tuning's is budget="uniform".

    Args:
        criterion: "fisher" (mean squared gradient: FISH mask), "gradient" (|mean gradient|), "weight_times_gradient"
            (SNIP), "gradient_on_small_weights" (GaLLoP's idea), "largest_weight", "smallest_weight" (PaFi),
            "low_rank_weight" (LIFT: the largest entries of the weight's low-rank part), or your own: a function
            (weight, gradients) -> scores, see `peft_sparse.Criterion`. A file holds the function's name, which is never
            imported.
        selection_batches: over how many batches the gradients are averaged.
        selection_passes: into how many parts the targets are split, each of which is scored in a pass of its own over
            the batches: the time of the selection grows with it, its memory falls. The result does not depend on it.
        random_share: share of the weights, in [0, 1), that is drawn at random before a criterion of gradients chooses
            the rest. Half and half did better than either alone (`examples/RESULTS.md`).
        chosen_rate: how much of each step the chosen weights take beside the drawn ones, in (0, 1], in any loop and
            under any optimizer: they act several times as strongly on the outputs, and want smaller steps. Nothing
            without a random part.
        seed: of the random part, which depends on what `RandConfig` says of its own.
        drawn_for: not a request: what the draw depended on beside the seed, filled in by the library.

    Source: see the functions of `peft_sparse.selection.criteria`.
    """

    method: str = field(default="one_shot", metadata={"help": "How the weights to tune are chosen."})
    criterion: str | Criterion | Callable[..., Tensor] = field(
        default="fisher", metadata={"help": "What scores the weights: a name, or a function."}
    )
    selection_batches: int = field(default=32, metadata={"help": "Batches over which gradients are averaged."})
    selection_passes: int = field(default=4, metadata={"help": "Parts of the targets that are scored one by one."})
    random_share: float = field(default=0.0, metadata={"help": "Share of the weights that is drawn at random."})
    chosen_rate: float = field(default=0.125, metadata={"help": "Share of each step that chosen weights take then."})
    seed: int = field(default=0, metadata={"help": "Seed of the random part."})
    drawn_for: str | None = field(default=None, metadata={"help": "Filled in by the library."})
    budget: str | dict[str, float] = field(
        default="global",
        metadata={"help": "How the total is spread: 'uniform', 'global', 'sc_sft_...' or {regex: share}."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_criterion(self.criterion)
        check_whole("seed", self.seed, least=0)
        self._check_random_share()
        for name in ("selection_batches", "selection_passes"):
            check_whole(name, getattr(self, name))

    def _check_random_share(self) -> None:
        share = self.random_share
        if not is_number(share) or not 0 <= share < 1:
            raise ConfigError(
                f"random_share must be a share of the weights in [0, 1), got {share!r}. RandConfig draws all of them."
            )
        if share and self.selected_by != GRADIENTS:
            raise ConfigError(
                f"random_share={share!r} is for criteria of gradients, and {criterion_name(self.criterion)!r} looks at "
                "the weights alone."
            )
        if not is_number(self.chosen_rate) or not 0 < self.chosen_rate <= 1:
            raise ConfigError(f"chosen_rate must be a share of each step in (0, 1], got {self.chosen_rate!r}.")
        if share and self.fitted_rate:
            raise ConfigError(
                f"random_share={share!r} has chosen weights take chosen_rate={self.chosen_rate!r} of each step, and "
                "fitted_rate=True would scale all of a tensor's by one number: give one of them."
            )
        if share and self.support_rows is not None:
            raise ConfigError(
                f"random_share={share!r} draws from all rows, and support_rows={self.support_rows!r} confines the "
                "support to some: give one of them."
            )

    @property
    def selected_by(self) -> str:  # type: ignore[override]
        """Whether the weights themselves choose the support, or gradients, which have to be seen first."""
        if isinstance(self.criterion, str) and self.criterion.startswith(CALLABLE):
            return GRADIENTS
        return GRADIENTS if resolve_criterion(self.criterion).needs_gradients else WEIGHTS

    def choose_anew(self) -> None:
        """See `SparseConfig`; the random part is drawn for the new adapter as well."""
        super().choose_anew()
        self.drawn_for = None

    def to_dict(self) -> dict[str, Any]:
        """All fields; a function by its name."""
        return {**super().to_dict(), "criterion": criterion_name(self.criterion)}


@method_name("given")
@dataclass
class GivenConfig(SparseConfig):
    """Tune the weights that you name, or those that another adapter tunes.

    The support says which tensors are tuned, and how many weights of each, so neither targets nor a density are given.

    Args:
        support: {parameter name: flat row-major indices}, in any order and without duplicates; or the folder or Hub
            id ("owner/name[/folder][@revision]") of a sparse adapter, whose support is copied and whose values are not.
            The support of an adapter in a model is
            {name: delta.indices for name, _, _, delta in iter_deltas(model, "its name")}.
    """

    method: str = field(default="given", metadata={"help": "How the weights to tune are chosen."})
    support: str | os.PathLike[str] | Mapping[str, Sequence[int] | Tensor] | None = field(
        default=None, metadata={"help": "{parameter: indices}, or an adapter whose support is copied."}
    )

    selected_by: ClassVar[str] = GIVEN

    @property
    def _is_bound_to_file(self) -> bool:
        return self.support is None

    def _check_request(self) -> None:
        # A file has the answer, and the targets that were read off the support.
        if self.counts is not None:
            return
        if not isinstance(self.support, (str, os.PathLike, Mapping)) or not self.support:
            raise ConfigError(
                f"support must be {{parameter name: indices}} or the path of a sparse adapter, got {self.support!r}."
            )
        superfluous = ("density", "num_weights", "equivalent_rank", "target_modules", "target_parameters")
        for name in superfluous:
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} must not be given beside support, which says which weights of which tensors are tuned, "
                    f"got {getattr(self, name)!r}."
                )

    def to_dict(self) -> dict[str, Any]:
        """All fields but a support of indices, which lies in the adapter's own file."""
        is_path = isinstance(self.support, (str, os.PathLike))
        return {**super().to_dict(), "support": os.fspath(self.support) if is_path else None}

"""Configuration of sparse fine-tunings: the request, checked when it is made, and the answer that a file carries."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...._peft_bridge import add_peft_type
from ....checkpoints.card_rows import METHOD_FACTS
from ....checkpoints.files import verify_before_loading
from ....checkpoints.native import Verified
from ....checks import FLOAT_DTYPES, check_flag, check_one_of, dtype_name, is_finite, is_whole, nearest
from ....errors import ConfigError
from ....selection.budget import check_budget, check_request
from ....selection.criteria import CRITERIA
from ....selection.rows import check_support_rows
from ...common.config import TARGETS, Stage, WeightConfig

SPARSE_FT = add_peft_type("SPARSE_FT")
BASE_METHOD = "fixed"
# What chooses an adapter's support: nothing (it comes with the adapter), random draws or the base model's weights when
# the adapter is made, the user, or else a first phase of training by its name: a dense phase, gradients over batches.
NOTHING, CHANCE, WEIGHTS, GIVEN = "nothing", "chance", "weights", "given"
DENSE_PHASE, GRADIENTS = "dense", "gradients"
VALUE_DTYPES = tuple(FLOAT_DTYPES)
# The name of each method, filled by `method_name` below; what `SparseConfig(method=...)` and a saved file resolve to.
METHODS: dict[str, type[SparseConfig]] = {}
# {what papers call a method, as `method_called` compares names: its name here}
_PUBLISHED = {"ltsft": "lottery_ticket", "randsft": "rand"}
# {what may be given for a method: what is meant}
_MEANT = {
    "spiel": "SpIEL is 'spiel_ag' or 'spiel_ma'.",
    "adasft": "Ada-SFT has a config of its own: AdaSftConfig.",
    "madg": "MAD-G has a config of its own: MadGConfig.",
    "madx": "MAD-X are bottleneck adapters: BottleneckConfig.",
    "bottleneck": "Bottleneck adapters have a config of their own: BottleneckConfig.",
}


def method_name(name: str):
    """Class decorator: make a config class the one that `method=name` gives."""

    def add(cls: type[SparseConfig]) -> type[SparseConfig]:
        METHODS[name] = cls
        METHOD_FACTS[name] = cls.card_facts
        # PEFT drops fields of a newer file that `SparseConfig.__init__` does not take, so it says that it takes all.
        base = SparseConfig if name != BASE_METHOD else cls
        known = {**inspect.signature(base.__init__).parameters, **inspect.signature(cls.__init__).parameters}
        base.__init__.__signature__ = inspect.Signature(known.values())
        return cls

    return add


@method_name(BASE_METHOD)
@dataclass
class SparseConfig(WeightConfig):
    """A sparse delta on a model's own weights: how many (budget), which (method), on what (targets).

    `SparseConfig(method="lottery_ticket", ...)` gives a `LotteryTicketConfig`, as does loading a file that says so;
    without a method it gives a `RandConfig`. Method "fixed" is what composed and imported adapters carry: their support
    is given, nothing selects it.

    Args:
        method: one of `METHODS`.
        density: share of the weights named by `density_of` to tune, in (0, 1].
        num_weights: the number of weights to tune, instead of a density.
        equivalent_rank: r instead of a density: r * (in + out) weights per targeted linear layer, the number that LoRA
            of rank r trains.
        density_of: what `density` is a share of: "targets" (the targeted tensors) or "model" (all parameters of the
            base model).
        budget: how the total is spread: "uniform" (the same density in every tensor), "global" (one joint selection
            over all targets) or {regex: share} (shares of the total per group of parameter names; a joint selection
            inside each group: SC-SFT). "sc_sft_nli", "sc_sft_sentiment" and "sc_sft_mlm" are SC-SFT's own shares, by
            depth (`peft_sparse.selection.layer_budgets.zones_of`); `layer_budget_from` measures those of an adapter.
        support_rows: keep the support of each tensor to this share of its rows, in (0, 1]; the number of weights stays
            what was asked for. A row is an output of a linear layer, a token of an embedding. The weight gradient is
            then a product of those rows alone, which is what a step on a GPU saves time by. Criteria take the rows with
            the largest sums of scores, then the best weights in them; random methods draw the rows. SpIEL keeps to its
            rows: SpIEL-AG chooses them by gradients where it replaces the whole first support, SpIEL-MA stays in those
            that were drawn. None: weights may lie anywhere. Vectors (biases, norms) have no rows and are not confined.
        target_modules: names (a module matches if its path ends with one), a regex for the whole path, "all-linear"
            (the default), or "all" (every parameter of the base model without its head: embeddings, biases, norms,
            convolutions).
        exclude_modules: names or a regex of modules to leave out.
        target_biases: tune the biases of the targeted modules as well.
        target_norms: True tunes the weights of all normalisation layers as well (their biases with `target_biases`),
            and these alone with target_modules=[]. False leaves all of them out, also where target_modules="all" or a
            regex would name them, in both phases of a two-phase method: the LT-SFT paper's language adapters have
            "all" and False. None (the default): as the other fields say, so "all" has them and "all-linear" has not.
        target_parameters: names of single parameters to tune (a parameter matches if its path ends with one); without
            target_modules these alone.
        layers_to_transform: indices of the layers to tune; the others are left out.
        layers_pattern: name of the module list that `layers_to_transform` counts in, if it is not obvious.
        modules_to_save: modules (heads) to train densely and save whole.
        trainable_token_indices: PEFT's own field: rows of the embedding to train densely.
        values_dtype: dtype of the trained values, in memory and in the file, whatever the weight's dtype.
        l1: lambda of the penalty lambda/N * sum |delta|, N the number of parameters of the base model.
        fitted_rate: scale the steps on each linear weight by how strongly its support acts on the layer's output, so
            that one learning rate, that of a random support, serves chosen ones too: see
            `peft_sparse.selection.output_energy`. It acts in any loop, trainer and optimizer, and follows a support
            that changes. Off by default: the methods' papers have one rate for all weights.
        init_weights: False starts from random values instead of zero (for tests: the adapter is then not the identity).
        counts: the answer, not a request: {parameter name: number of tuned weights}, filled in by the library and saved
            in the file.
        provenance: not a request either: how an adapter came about that no training here made, such as {"tuned": ...,
            "criterion": "change", "share_kept": 0.41}; filled in by the library and told by the model card.

    Raises:
        ConfigError: a field has a value that no run can honour; the message says which rule it breaks and what to write
            instead.
    """

    method: str = field(default="rand", metadata={"help": "How the weights to tune are chosen."})
    density: float | None = field(default=None, metadata={"help": "Share of the weights to tune, in (0, 1]."})
    num_weights: int | None = field(default=None, metadata={"help": "Number of weights to tune."})
    equivalent_rank: int | None = field(default=None, metadata={"help": "As many weights as LoRA of this rank trains."})
    density_of: str = field(default="targets", metadata={"help": "What density is a share of: 'targets' or 'model'."})
    budget: str | dict[str, float] = field(
        default="uniform",
        metadata={"help": "How the total is spread: 'uniform', 'global', 'sc_sft_...' or {regex: share}."},
    )
    support_rows: float | None = field(
        default=None, metadata={"help": "Share of the rows of each tensor that its tuned weights may lie in."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names, a regex, 'all-linear' (the default) or 'all'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    target_biases: bool = field(default=False, metadata={"help": "Tune the biases of the targeted modules as well."})
    target_norms: bool | None = field(
        default=None, metadata={"help": "Tune all normalisation layers as well (True), or none of them (False)."}
    )
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Single parameters to tune."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers to tune."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train densely and save."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embedding to train densely (PEFT's own field)."}
    )
    values_dtype: str = field(default="float32", metadata={"help": "dtype of the trained values."})
    l1: float = field(default=0.0, metadata={"help": "Weight of the L1 penalty on the delta."})
    fitted_rate: bool = field(
        default=False, metadata={"help": "Scale each tensor's steps by the output energy of its support."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Start from the identity. False is for tests."})
    counts: dict[str, int] | None = field(default=None, metadata={"help": "Filled in by the library."})
    provenance: dict[str, Any] | None = field(default=None, metadata={"help": "Filled in by the library."})

    # Not fields: the checked file that this config came with, until it is loaded; whether `counts` are asked for all
    # the same (by a plan); and whether a model's own copy was made without them, so that they are not those of a file.
    verified: ClassVar[Verified | None] = None
    asks_for_counts = False
    is_chosen_anew = False
    default_method: ClassVar[str] = "rand"
    # What chooses the support of this method; until then an adapter holds no weight.
    selected_by: ClassVar[str] = NOTHING

    def __new__(cls, *args: Any, **kwargs: Any) -> SparseConfig:
        if cls is SparseConfig:
            method = method_called(kwargs.get("method", cls.default_method))
            if not isinstance(method, str) or method not in METHODS:
                raise ConfigError(
                    f"method must be one of {sorted(METHODS)}, got {method!r}.{_meant(method)} A file that says so was "
                    "written by a newer peft-sparse: pip install -U peft-sparse"
                )
            cls = METHODS[method]
        return super().__new__(cls, *args, **kwargs)

    @property
    def first_phase(self) -> str | None:
        """The phase that has yet to choose the support; None if there is none, or if it has chosen."""
        is_phase = self.selected_by not in (NOTHING, CHANCE, WEIGHTS, GIVEN)
        return self.selected_by if is_phase and not any((self.counts or {}).values()) else None

    @property
    def label(self) -> str:
        """The method."""
        return self.method

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The dense phase, or the selection by gradients, if it is still to come; then training of the weights."""
        if self.first_phase == DENSE_PHASE:
            return (Stage("dense phase", trains=TARGETS), Stage("sparse phase"))
        if self.first_phase == GRADIENTS:
            return (Stage("selection by gradients", selects=True), *super().stages)
        return super().stages

    def choose_anew(self) -> None:
        """Take out what the library has filled in for another adapter, so that a new one has weights of its own choice.

        Counts of an adapter that has no way to choose stay.
        """
        if not self._is_bound_to_file and not self.asks_for_counts:
            self.counts = self.verified = None
            self.is_chosen_anew = True

    @property
    def _is_bound_to_file(self) -> bool:
        """Whether the weights to tune are known from the adapter's own file alone."""
        return self.selected_by == NOTHING

    @staticmethod
    def card_facts(config: Mapping[str, Any]) -> list[str]:
        """What the model card says of this method alone; `config` is a dictionary, as a file holds it."""
        return []

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, str]]:
        # copy and pickle call `__new__` with these alone.
        return (), {"method": self.method}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SPARSE_FT
        self.method, self.values_dtype = method_called(self.method), dtype_name(self.values_dtype)
        if METHODS.get(self.method) is not type(self):
            own = next((name for name, cls in METHODS.items() if cls is type(self)), None)
            raise ConfigError(
                f"method must be {own!r} for a {type(self).__name__}, got {self.method!r}. "
                "SparseConfig(method=...) picks the class."
            )
        self._check_request()
        check_budget(self.budget)
        check_support_rows(self.support_rows)
        if self.support_rows is not None and self.selected_by in (NOTHING, GIVEN):
            raise ConfigError(
                f"support_rows must not be given to method {self.method!r}, whose weights are chosen already, got "
                f"{self.support_rows!r}."
            )
        self._check_targets()
        check_one_of("values_dtype", self.values_dtype, VALUE_DTYPES)
        check_flag("fitted_rate", self.fitted_rate)
        if not (is_finite(self.l1) and self.l1 >= 0):
            raise ConfigError(f"l1 must be a finite number >= 0, got {self.l1!r}.")
        _check_counts(self.counts)

    def _check_request(self) -> None:
        check_request(
            density=self.density,
            num_weights=self.num_weights,
            equivalent_rank=self.equivalent_rank,
            density_of=self.density_of,
        )

    def _check_targets(self) -> None:
        for name, known in (("target_biases", (True, False)), ("target_norms", (True, False, None))):
            if not any(getattr(self, name) is one for one in known):
                raise ConfigError(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}.")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ConfigError(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform: "
                "it says where those indices are counted."
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SparseConfig:
        """Load a config (PEFT's method), and check the weights beside it while the model is still untouched.

        Raises:
            FormatError: the weights are damaged or do not fit the config.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        download_kwargs, _, _ = cls._split_kwargs(kwargs)
        where = pretrained_model_name_or_path
        config.verified = verify_before_loading(where, config.counts, subfolder=subfolder, **download_kwargs)
        return config


def method_called(given: Any) -> Any:
    """The name of a method as `METHODS` spells it: "SpIEL-AG" is "spiel_ag", and "LT-SFT" is "lottery_ticket"."""
    if not isinstance(given, str):
        return given
    bare = {name.replace("_", ""): name for name in METHODS} | _PUBLISHED
    return bare.get(_bare(given), given)


def _bare(name: str) -> str:
    return re.sub(r"[-_\s]", "", name).lower()


def _meant(method: object) -> str:
    """The sentence, behind a blank, that says what an unknown method may mean; else nothing."""
    bare = _bare(str(method))
    if bare in _MEANT:
        return f" {_MEANT[bare]}"
    criterion = next((name for name in CRITERIA if _bare(name) == bare), None)
    if criterion is not None:
        return f" {criterion!r} is a criterion: method='one_shot', criterion={criterion!r}."
    return nearest(method, METHODS)


def _check_counts(counts: object) -> None:
    if counts is None:
        return
    if not isinstance(counts, dict) or not all(
        isinstance(k, str) and is_whole(v) and v >= 0 for k, v in counts.items()
    ):
        raise ConfigError(f"counts must map parameter names to numbers of weights >= 0, got {counts!r}.")

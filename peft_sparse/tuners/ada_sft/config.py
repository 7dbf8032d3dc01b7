"""Configuration of Ada-SFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..._peft_bridge import add_peft_type
from ...checks import is_number
from ...errors import ConfigError
from ..common.config import Stage, WeightConfig
from ..common.field_checks import ALL_LINEAR, ALL_PARAMETERS
from ..sparse_ft.configs.base import SparseConfig

ADA_SFT = add_peft_type("ADA_SFT")
MASK, WEIGHTS, COMPOSED = "mask", "weights", "composed"
# What an adapter holds of each weight; the last one named trains.
HELD = {MASK: ("scores",), WEIGHTS: ("scores", "difference"), COMPOSED: ("difference",)}


@dataclass
class AdaSftConfig(WeightConfig):
    """Ada-SFT: learn a soft mask M = sigmoid(S) over frozen linear weights, then the weights under the fixed mask.

    In the first phase a targeted weight acts as W * M and S trains; in the second one (W + D) * M acts and D trains,
    from zero: the weights start at the pretrained ones again. `SparseTrainer` goes through both. In a loop of your own
    train, call `start_weight_phase`, and train again with a new optimizer. Not parameter-efficient: each phase trains
    as many numbers as the targeted layers have weights. `sparse_from_ada` makes a sparse adapter of the result.

    S starts at logit(initial_mask) everywhere. sigmoid(S) is never 1, and its slope M * (1 - M) vanishes on the way
    there: the nearer a mask starts to 1, the slower it learns (Adam's steps do not depend on the slope until gradients
    fall below its epsilon, but what a step moves the mask by does). Therefore masks are taken relative to their start:
    sigmoid(S) / initial_mask. That is the paper's formula for W / initial_mask in place of W. Training begins at the
    pretrained model bit for bit, differences hold nothing but what was learnt, and a mask can grow to 1 / initial_mask.
    How the start matters, on a toy (a BERT of two layers, 200 steps of Adam): at learning rate 0.01 the loss fell from
    6.30 to 1.87, 2.85, 5.19 and 6.21 with `initial_mask` 0.5, 0.9, 0.99 and 0.999; at 0.1 to 1.00, 1.33, 1.37 and 1.37.
    So give the first phase a learning rate of 0.01 to 0.1, whatever the second one has.

    Args:
        target_modules: names (a module matches if its path ends with one), a regex for the whole path, or "all-linear".
            Linear layers only: nn.Linear and transformers' Conv1D, not quantised.
        exclude_modules: names or a regex of modules to leave out.
        layers_to_transform: indices of the layers to tune; the others are left out.
        layers_pattern: name of the list that `layers_to_transform` counts in, where there are several.
        modules_to_save: modules to train densely, in both phases, and to save (a classification head).
        trainable_token_indices: PEFT's own field: rows of the embedding to train densely.
        initial_mask: sigmoid(S) at the start, in (0, 1).
        from_identity: masks relative to their start, as above. False takes the paper's formula to the letter: masks in
            [0, 1], and a start at which every targeted weight is `initial_mask` times itself; use 0.99 or more then.
        density: share of the targeted weights that `sparse_from_ada` keeps, in (0, 1], where its caller names none.
        budget: how those are spread over tensors, see `SparseConfig`; likewise.
        init_weights: False starts from random scores (for tests: the adapter is then not the identity).
        phase: the answer, not a request: "mask" (the first phase), "weights" (the second, and after it) or "composed"
            (a sum that `add_weighted_adapter` made), filled in by the library and saved in the file.

    Raises:
        ConfigError: a field has a value that no run can honour.

    Cost: scores, their gradients and the optimizer's two moments, each in float32 and of the size of the targeted
        weights; in the second phase the same for the differences, and the scores beside them.
    Source: Sharma and Chauhan, "Parameter Efficient Approach for Zero-shot Cross Lingual Transfer", section 3.4. The
        paper gives the two formulas and the two steps, for linear layers; initialisation, learning rates, lengths, a
        regulariser and what happens to heads between the phases it leaves open, and its code was not published. Ours:
        the relative start, `initial_mask`, no regulariser, heads that go on. The second phase trains D = W - W0 instead
        of W: the same steps, but for weight decay, which pulls to the pretrained weights instead of to zero, and but
        for rounding, as D is float32 over weights of any dtype. Likewise decay of S pulls to its start.
    """

    target_modules: list[str] | str | None = field(
        default=ALL_LINEAR, metadata={"help": "Module names, a regex, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers to tune."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train densely and save."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embedding to train densely (PEFT's own field)."}
    )
    initial_mask: float = field(default=0.9, metadata={"help": "sigmoid(S) at the start, in (0, 1)."})
    from_identity: bool = field(default=True, metadata={"help": "Whether masks are relative to their start."})
    density: float | None = field(default=None, metadata={"help": "Share of the weights that sparse_from_ada keeps."})
    budget: str | dict[str, float] = field(
        default="global", metadata={"help": "How those are spread: 'uniform', 'global' or {regex: share}."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Start from equal scores. False is for tests."})
    phase: str = field(default=MASK, metadata={"help": "Filled in by the library."})

    # PEFT asks every config for it; and what a `TargetRequest` may ask for beside, which masks cannot serve.
    target_parameters = None
    counts: ClassVar[None] = None
    target_biases: ClassVar[bool] = False
    target_norms: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ADA_SFT
        number = self.initial_mask
        if not is_number(number) or not 0 < number < 1:
            raise ConfigError(
                f"initial_mask must be in (0, 1), got {number!r}: a sigmoid reaches neither end. To start at the "
                "pretrained model keep from_identity=True, at any initial_mask."
            )
        if not isinstance(self.phase, str) or self.phase not in HELD:
            raise ConfigError(
                f"phase must be one of {list(HELD)}, got {self.phase!r}. A file that says so was written by a newer "
                "peft-sparse: pip install -U peft-sparse"
            )
        if self.target_modules == ALL_PARAMETERS:
            raise ConfigError(
                'target_modules="all" names embeddings and norms too, and Ada-SFT masks linear layers only: '
                'target_modules="all-linear".'
            )
        # What it checks of the fields that both have, it checks for us.
        self.as_sparse()

    @property
    def first_phase(self) -> str | None:
        """The mask phase, until the masks are fixed."""
        return MASK if self.phase == MASK else None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The mask phase, until the masks are fixed; then the weight phase."""
        second = Stage("weight phase", fields={"phase": WEIGHTS})
        return (Stage("mask phase"), second) if self.phase == MASK else (second,)

    @property
    def takes_quantised_base(self) -> bool:
        """Never: masks multiply the base weights themselves."""
        return False

    def as_sparse(
        self, *, density: float | None = None, budget: str | dict[str, float] | None = None, **fields: Any
    ) -> SparseConfig:
        """The config of a sparse adapter on the same targets.

        Args:
            density, budget: instead of this config's own; without any density all weights.
            fields: more of `SparseConfig`'s.
        """
        chosen = density if density is not None else self.density
        return SparseConfig(
            method="fixed",
            density=1.0 if chosen is None else chosen,
            budget=self.budget if budget is None else budget,
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            layers_to_transform=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
            modules_to_save=self.modules_to_save,
            trainable_token_indices=self.trainable_token_indices,
            task_type=self.task_type,
            base_model_name_or_path=self.base_model_name_or_path,
            revision=self.revision,
            peft_version=self.peft_version,
            **fields,
        )

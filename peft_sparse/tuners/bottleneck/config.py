"""Configuration of bottleneck adapters: the request, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..._peft_bridge import add_peft_type
from ...checks import check_one_of, is_finite, is_whole
from ...errors import ConfigError
from ..common.config import WeightConfig
from .adapter import LEARNED, activation_named
from .invertible import COUPLINGS

BOTTLENECK = add_peft_type("BOTTLENECK")
KINDS = ("pfeiffer", "houlsby", "parallel")
# Where in its layer an adapter acts; `placement.py` says what each of them means.
PLACEMENTS = ("norm", "block", "output", "parallel", "residual")
INITS = ("near_identity", "identity")
DEFAULT_REDUCTION_FACTOR = 16
_ELSEWHERE = {
    "r": "bottleneck_size=... is the width inside the adapter.",
    "rank": "bottleneck_size=... is the width inside the adapter.",
    "adapter_size": "bottleneck_size=... is the width inside the adapter.",
    "non_linearity": "It is called activation here.",
    "inv_adapter": "It is called invertible here.",
    "density": "A bottleneck adapter has a size, no density: bottleneck_size=... or reduction_factor=...",
}


@dataclass
class BottleneckConfig(WeightConfig):
    """Bottleneck adapters: a down-projection, an activation and an up-projection in every layer of a frozen model.

    On the architectures of `placement.ANATOMIES` nothing but the kind has to be said. On any other, `target_modules`
    names the modules at which the adapters act and `placement` what they do there.

    Args:
        kind: "pfeiffer" (one adapter in each layer: its input is the layer's output, on post-norm models after the
            norm; it is added to the residual before that norm), "houlsby" (two in each layer, behind attention and
            behind the feed-forward, before their residuals are added) or "parallel" (one beside the feed-forward, from
            its input to its output).
        bottleneck_size: m, the width inside the adapter.
        reduction_factor: the same as a share: m = h / reduction_factor, h the width of the model; 16 if neither is
            given.
        activation: name of one of transformers' activations.
        scaling: factor of the adapter's output, a number or "learned" (one number in each adapter, from 1).
        dropout: probability to drop an entry of the adapter's output, in [0, 1).
        invertible: "nice" or "glow" adds an invertible adapter behind the embeddings, undone before the output
            embeddings where the model has some (MAD-X); None adds none.
        invertible_reduction_factor: half the embeddings' width over the width inside the invertible adapter.
        layers_to_transform: indices of the layers that get adapters; all if None. Each stack (encoder, decoder)
            counts from 0.
        leave_out: indices of layers that get none; negative ones count from the end. MAD-X 2.0 is
            [-1] in the language adapter and in the task adapter.
        init: "near_identity" (small random weights) or "identity" (the up-projections start at zero).
        init_weights: False starts from large random values (for tests).
        target_modules: module names (a module matches if its path ends with one) or a regex for the whole path.
        placement: what the adapters do at `target_modules`: "norm" (the module is a norm that sees the residual sum r:
            it gives norm(r + A(norm(r)))), "block" (A is added, from the output itself, to the output of the module's
            parent, a layer that adds its residual itself), "output" (A is added, from the output, to the module's
            output), "parallel" (A is added, from the module's input, to its output) or "residual" (A is added, from
            itself, to the second argument of the module's parent). None takes what fits the kind.
        invertible_module: name or regex of the module whose output is the embeddings, where that is not known.
        exclude_modules: names or a regex of modules to leave out.
        modules_to_save: modules (heads) to train densely and save whole.
        trainable_token_indices: PEFT's own field: rows of the embedding to train densely.

    Raises:
        ConfigError: a field has a value that no run can honour.

    Source: Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247 (thesis equation 2.8); He et
    al. 2022, arXiv:2110.04366 (parallel); Pfeiffer et al. 2020, arXiv:2005.00052 (MAD-X). Differs from the `adapters`
    library in presets (there "houlsby" has swish, "parallel" has reduction factor 2 and scaling 4); on pre-norm models
    in the input of "parallel" (here the feed-forward's own, after the norm; there the residual before it); and in
    stacks with invertible adapters (here all of them act; there the first adapter's alone, and it is undone in the
    library's own heads only).
    """

    kind: str = field(default="pfeiffer", metadata={"help": "'pfeiffer', 'houlsby' or 'parallel'."})
    bottleneck_size: int | None = field(default=None, metadata={"help": "Width inside the adapter."})
    reduction_factor: float | None = field(
        default=None, metadata={"help": "Width of the model over width inside the adapter; 16 if neither is given."}
    )
    activation: str = field(default="relu", metadata={"help": "One of transformers' activations."})
    scaling: float | str = field(default=1.0, metadata={"help": "Factor of the output: a number or 'learned'."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter's output."})
    invertible: str | None = field(default=None, metadata={"help": "Invertible adapter: 'nice', 'glow' or None."})
    invertible_reduction_factor: float = field(default=2, metadata={"help": "Narrowing in the invertible adapter."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers that get adapters."})
    leave_out: list[int] | None = field(default=None, metadata={"help": "Layers that get none; -1 is the last."})
    init: str = field(default="near_identity", metadata={"help": "'near_identity' or 'identity'."})
    init_weights: bool = field(default=True, metadata={"help": "False starts from large random values, for tests."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Where, on other architectures."})
    placement: str | None = field(default=None, metadata={"help": "What adapters do at target_modules."})
    invertible_module: list[str] | str | None = field(default=None, metadata={"help": "Module that gives embeddings."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train densely and save."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embedding to train densely (PEFT's own field)."}
    )

    elsewhere = _ELSEWHERE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK
        if isinstance(self.leave_out, int):
            self.leave_out = [self.leave_out]
        check_one_of("kind", self.kind, KINDS)
        check_one_of("init", self.init, INITS)
        check_one_of("placement", self.placement, (None, *PLACEMENTS))
        check_one_of("invertible", self.invertible, (None, *COUPLINGS))
        self._check_sizes()
        activation_named(self.activation)
        if self.scaling != LEARNED and not is_finite(self.scaling):
            raise ConfigError(f"scaling must be a finite number or {LEARNED!r}, got {self.scaling!r}.")
        if not (is_finite(self.dropout) and 0 <= self.dropout < 1):
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout!r}.")
        if self.placement is not None and self.target_modules is None:
            raise ConfigError(f"placement={self.placement!r} needs target_modules: it says what happens there.")

    def _check_sizes(self) -> None:
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            raise ConfigError(
                f"bottleneck_size and reduction_factor say the same thing: give one of them, got "
                f"{self.bottleneck_size!r} and {self.reduction_factor!r}."
            )
        size = self.bottleneck_size
        if size is not None and not (is_whole(size) and size >= 1):
            raise ConfigError(f"bottleneck_size must be a whole number >= 1, got {size!r}.")
        for name in ("reduction_factor", "invertible_reduction_factor"):
            factor = getattr(self, name)
            if factor is not None and not (is_finite(factor) and factor > 0):
                raise ConfigError(f"{name} must be a finite number > 0, got {factor!r}.")

    def size_for(self, width: int) -> int:
        """The bottleneck size m in a model of that width; at least 1."""
        if self.bottleneck_size is not None:
            return self.bottleneck_size
        return max(1, self.share_of(width, self.reduction_factor or DEFAULT_REDUCTION_FACTOR))

    @staticmethod
    def share_of(width: int, factor: float) -> int:
        """width / factor, rounded down, and no number that is too large to count with."""
        return int(min(width // factor, 2.0**60))

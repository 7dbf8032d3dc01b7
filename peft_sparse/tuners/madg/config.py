"""Configuration of MAD-G: the request, checked when it is made."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..._peft_bridge import add_peft_type
from ...checks import is_whole
from ...errors import ConfigError
from ...typology import Typology
from ...typology.table import DEFAULT_FEATURES
from ..bottleneck.adapter import LEARNED
from ..bottleneck.config import BottleneckConfig
from .saved_typology import check_typology

MAD_G = add_peft_type("MAD_G")
# What an adapter trains beside what a hypernetwork generates.
NOT_GENERATED = ("modules_to_save", "trainable_token_indices")
# What a generated adapter has of its own, whatever the hypernetwork's.
_NOT_PASSED_ON = ("peft_type", *NOT_GENERATED, "inference_mode", "init_weights")


@dataclass
class MadGConfig(BottleneckConfig):
    """MAD-G: one hypernetwork generates the bottleneck adapter of any language from its typological vector.

    theta = W V t, where t is the language's vector, V t its embedding, and theta the weights of all adapters in the
    model (thesis equation 3.1); with layer embeddings theta_b = W (V t + e_b), + for concatenation (equation 3.2).

    Args:
        bottleneck_size: m, the width inside the generated adapters.
        language_dim: d_l, the size of a language's embedding.
        layer_dim: d_b, the size of a layer's embedding (MAD-G-LS: one generator for all layers, 2hm(d_l + d_b)
            numbers); None gives every layer a generator of its own (MAD-G: 2hm d_l numbers for each layer).
        features: sets of features to read, where `typology` is a file or None.
        typology: the vectors: what `load_typology` gives, {language code: vector [F]}, the path of a file, or None for
            what `load_typology()` finds. It is not saved; the vectors of the languages used are.
        language: a language to start with; see `MadGModel.set_language`.
        saved_typology: filled in by the tuner: source, version, digest, names of the features, and the vectors of the
            languages used so far.

    All other fields are those of `BottleneckConfig` and say where the adapters lie and what they compute. Generated
    adapters have no biases (thesis 3.3.1). `invertible` and a learned `scaling` are not generated and are refused.

    Initial values: entries of V have variance 1/F, so that a language embedding has entries of variance |t|^2/F, at
    most 1 for features between 0 and 1; entries of W have deviation 0.01 / sqrt(d_l + d_b), layer embeddings variance
    1. So every generated weight starts with a deviation of at most 0.01, that of a bottleneck adapter's own
    "near_identity", whatever the language and the sizes. With `init="identity"` the part of W that generates
    up-projections is zero, and with it every adapter's effect.

    Learning rate: a step of Adam moves each generated weight by about rate * |V t|_1: at the start and with d_l = 32
    some 14 times as far as a weight of its own, with layer embeddings of 32 some 40 times. So take a tenth or less of
    what a bottleneck adapter takes. In trials of 120 steps on real text the best of four was 3e-4, and 3e-3 for a
    single adapter; the thesis trains 200,000 steps from 5e-5 (3.4.2).

    In several processes each may see languages of its own: every parameter takes part whatever the language, so DDP
    needs no `find_unused_parameters`. The process that writes the adapter saves the vectors of the languages that it
    knows: give `LanguageSwitch`, or `set_language` once before the run, the list of all. FSDP1 shows the shared
    parameters to one layer only; where layers are units of their own it is refused.

    Cost: in evaluation without gradients a single process keeps the generated weights of one language, 2hm for each
        site. Under FSDP2 every layer gathers V, and with layer embeddings W, anew and keeps it until its backward.

    Raises:
        ConfigError: a field has a value that no run can honour.

    Source: Ansell et al. 2021, MAD-G; thesis 3.3.1 and 3.3.2. The authors released no code; the initial values are
    ours (scaled after the idea of Chang et al. 2020, Principled Weight Initialization for Hypernetworks).
    """

    bottleneck_size: int | None = field(default=384, metadata={"help": "Width inside the adapters."})
    language_dim: int = field(default=32, metadata={"help": "Size of a language embedding."})
    layer_dim: int | None = field(default=None, metadata={"help": "Size of a layer embedding (MAD-G-LS), or None."})
    features: list[str] = field(
        default_factory=lambda: list(DEFAULT_FEATURES), metadata={"help": "Sets of features to read."}
    )
    typology: Any = field(default=None, compare=False, metadata={"help": "Vectors, a file of them, or None."})
    language: str | None = field(default=None, metadata={"help": "The language to start with."})
    saved_typology: dict[str, Any] | None = field(default=None, metadata={"help": "Filled in by the tuner."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MAD_G
        for name in ("language_dim", "layer_dim"):
            size = getattr(self, name)
            optional = name == "layer_dim" and size is None
            if not optional and not (is_whole(size) and size >= 1):
                raise ConfigError(f"{name} must be a whole number >= 1, got {size!r}.")
        if self.invertible is not None:
            raise ConfigError(
                f"invertible={self.invertible!r}: MAD-G generates no invertible adapters. Leave it out, or train a "
                "BottleneckConfig with invertible=... for each language."
            )
        if self.scaling == LEARNED:
            raise ConfigError(f"scaling must be a number for MAD-G, got {LEARNED!r}: it is not generated.")
        names = [self.features] if isinstance(self.features, str) else self.features
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"features must name sets of typological features, got {self.features!r}.")
        if not isinstance(self.language, (str, type(None))):
            raise ConfigError(f"language must be the code of a language to start with, or None, got {self.language!r}.")
        self.features = list(names)
        check_typology(self.typology)
        if isinstance(self.typology, Mapping):
            self.typology = Typology.from_vectors(self.typology)

    def to_dict(self) -> dict[str, Any]:
        """All fields but `typology`, of which `saved_typology` holds what the adapter needs."""
        plain = copy.copy(self)
        plain.typology = None
        return super(MadGConfig, plain).to_dict()

    def bottleneck_config(self) -> BottleneckConfig:
        """The config of the adapters that this one generates."""
        names = [f.name for f in fields(BottleneckConfig) if f.name not in _NOT_PASSED_ON and f.init]
        return BottleneckConfig(**{name: copy.deepcopy(getattr(self, name)) for name in names})

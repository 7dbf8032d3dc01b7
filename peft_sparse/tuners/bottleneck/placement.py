"""Where in a model adapters lie: a table of architectures, and what `target_modules` says for all others.

What happens at a site is its placement:

- "norm": the module is a norm that sees the residual sum r of its layer. It gives norm(r + A(norm(r))): thesis equation
  2.8 with the model's own norm after it.
- "block": the module lies in a layer that adds its residual itself and has no norm behind it. The layer's output r
  becomes r + A(r): the same adapter on a pre-norm model.
- "output": the module's output f, not added to a residual yet, becomes f + A(f) (Houlsby).
- "parallel": the module's output f(x) becomes f(x) + A(x).
- "residual": the same where no single module computes f: x, which is the second argument of the module's parent
  because it is also the residual, becomes x + A(x).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..._peft_bridge import BaseTunerLayer, _get_in_out_features
from ...core.names import ends_with
from ...errors import ConfigError
from ...selection.patterns import fullmatch
from ..common.target_checks import warn_of_exclusions
from ..common.targets import is_excluded, named_targets
from .config import BottleneckConfig

NORM, BLOCK, OUTPUT, PARALLEL, RESIDUAL = "norm", "block", "output", "parallel", "residual"
INVERTIBLE = "invertible"


@dataclass(frozen=True)
class Anatomy:
    """The sites of an architecture, as (regex for the end of a module's path, placement), by kind of adapter.

    Attributes:
        pfeiffer, houlsby, parallel: of each kind; None where there is no module to hold on to.
        invertible: the module whose output is the embeddings.
    """

    pfeiffer: tuple[str, str]
    houlsby: tuple[str, str]
    parallel: tuple[str, str] | None
    invertible: str | None


_BERT = Anatomy(
    pfeiffer=(r"layer\.\d+\.output\.LayerNorm", NORM),
    houlsby=(r"layer\.\d+\.((cross)?attention\.)?output\.dropout", OUTPUT),
    parallel=(r"layer\.\d+\.output\.dropout", RESIDUAL),
    invertible=r"embeddings\.dropout",
)
_DISTILBERT = Anatomy(
    pfeiffer=(r"layer\.\d+\.output_layer_norm", NORM),
    houlsby=(r"layer\.\d+\.(attention\.out_lin|ffn)", OUTPUT),
    parallel=(r"layer\.\d+\.ffn", PARALLEL),
    invertible=r"embeddings\.dropout",
)
_ALBERT = Anatomy(
    pfeiffer=(r"albert_layers\.\d+\.full_layer_layer_norm", NORM),
    houlsby=(r"albert_layers\.\d+\.(attention\.output_dropout|ffn_output)", OUTPUT),
    parallel=None,
    invertible=r"embeddings\.dropout",
)
_MODERNBERT = Anatomy(
    pfeiffer=(r"layers\.\d+\.mlp", BLOCK),
    houlsby=(r"layers\.\d+\.(attn\.out_drop|mlp)", OUTPUT),
    parallel=(r"layers\.\d+\.mlp", PARALLEL),
    invertible=r"embeddings\.drop",
)
_LLAMA = Anatomy(
    pfeiffer=(r"layers\.\d+\.mlp", BLOCK),
    houlsby=(r"layers\.\d+\.(self_attn\.o_proj|mlp)", OUTPUT),
    parallel=(r"layers\.\d+\.mlp", PARALLEL),
    invertible="embed_tokens",
)
# A norm lies between each sublayer and its residual.
_GEMMA2 = Anatomy(
    pfeiffer=(r"layers\.\d+\.mlp", BLOCK),
    houlsby=(r"layers\.\d+\.post_(attention|feedforward)_layernorm", OUTPUT),
    parallel=(r"layers\.\d+\.mlp", PARALLEL),
    invertible="embed_tokens",
)
_GPT2 = Anatomy(
    pfeiffer=(r"h\.\d+\.mlp", BLOCK),
    houlsby=(r"h\.\d+\.((attn|crossattention)\.resid_dropout|mlp)", OUTPUT),
    parallel=(r"h\.\d+\.mlp", PARALLEL),
    invertible=r"transformer\.drop|drop",
)
_T5 = Anatomy(
    pfeiffer=(r"block\.\d+\.layer\.\d+\.DenseReluDense", BLOCK),
    houlsby=(r"block\.\d+\.layer\.\d+\.dropout", OUTPUT),
    parallel=(r"block\.\d+\.layer\.\d+\.DenseReluDense", PARALLEL),
    invertible=None,
)
_BART = Anatomy(
    pfeiffer=(r"layers\.\d+\.final_layer_norm", NORM),
    houlsby=(r"layers\.\d+\.((self_attn|encoder_attn)\.out_proj|fc2)", OUTPUT),
    parallel=None,
    invertible=None,
)

# {model_type of transformers' config: anatomy}
ANATOMIES: dict[str, Anatomy] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2"), _BERT),
    "distilbert": _DISTILBERT,
    "albert": _ALBERT,
    "modernbert": _MODERNBERT,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma3"), _GEMMA2),
    "gpt2": _GPT2,
    **dict.fromkeys(("t5", "mt5"), _T5),
    "bart": _BART,
}


@dataclass(frozen=True)
class Site:
    """One place that gets an adapter.

    Attributes:
        placement: what happens there, one of the constants above.
        width: h, the size of the hidden states there.
    """

    placement: str
    width: int


def resolve(config: BottleneckConfig, model: nn.Module) -> BottleneckConfig:
    """Write into a config what its request means on a model: patterns for `target_modules` and `invertible_module`, and
    the placement.

    Args:
        config: a copy of the user's config; changed in place and returned.
        model: the base model.

    Raises:
        ConfigError: the architecture is unknown, or has no place for what is asked.
    """
    model_type = _model_type(model)
    anatomy = ANATOMIES.get(model_type)
    if config.target_modules is None:
        if anatomy is None:
            raise ConfigError(_unknown(model, model_type))
        site = getattr(anatomy, config.kind)
        if site is None:
            raise ConfigError(
                f"kind={config.kind!r} is not known for {model_type!r}: no single module of it computes the "
                'feed-forward. Use kind="pfeiffer" or "houlsby", or name a module with target_modules and '
                'placement="parallel".'
            )
        config.target_modules, config.placement = _at_end(site[0]), site[1]
    elif config.placement is None:
        config.placement = _placement_for(config, model)
    if config.invertible is not None and config.invertible_module is None:
        if anatomy is None or anatomy.invertible is None:
            raise ConfigError(
                f"invertible={config.invertible!r}: it is not known which module of {model_type!r} gives the "
                "embeddings that its layers read. Name it with invertible_module=..., or leave invertible out."
            )
        config.invertible_module = _at_end(anatomy.invertible)
    return config


def reads_after_norm(model: nn.Module) -> bool:
    """Whether a model's feed-forward reads a norm of the residual (a pre-norm model), and not the residual itself."""
    anatomy = ANATOMIES.get(_model_type(model))
    return anatomy is not None and anatomy.pfeiffer[1] == BLOCK


def find_sites(config: BottleneckConfig, model: nn.Module) -> dict[str, Site]:
    """{path: site} of every module that a resolved config puts something at, in the order of the model.

    Raises:
        ConfigError: no module matches, a layer index does not exist, or a width cannot be found.
    """
    modules = dict(named_targets(model))
    warn_of_exclusions(config.exclude_modules, modules)
    paths = [name for name in modules if _matches(config.target_modules, name) and not is_excluded(config, name)]
    if not paths:
        raise ConfigError(
            f"target_modules={config.target_modules!r} matches no module of this {type(model).__name__}. "
            f"{_candidates(modules)}"
        )
    kept = _kept_layers(config, paths, modules)
    sites = {name: Site(config.placement, _width(name, modules[name], model)) for name in paths if name in kept}
    if not sites:
        raise ConfigError(
            f"layers_to_transform={config.layers_to_transform!r} and leave_out={config.leave_out!r} leave no layer."
        )
    if config.invertible is not None:
        embeddings = [name for name in modules if _matches(config.invertible_module, name)]
        if len(embeddings) != 1 or embeddings[0] in sites:
            raise ConfigError(
                f"invertible_module={config.invertible_module!r} must match exactly one module, which is no target of "
                f"the other adapters; it matches {embeddings or 'none'}."
            )
        if is_excluded(config, embeddings[0]):
            raise ConfigError(
                f"invertible_module={config.invertible_module!r} is {embeddings[0]}, which exclude_modules or "
                "modules_to_save names too: a module can be adapted or trained whole, not both."
            )
        sites[embeddings[0]] = Site(INVERTIBLE, _width(embeddings[0], modules[embeddings[0]], model, embedding=True))
    return {name: sites[name] for name in modules if name in sites}


def _kept_layers(config: BottleneckConfig, paths: list[str], modules: Iterable[str]) -> set[str]:
    """The paths whose layers `layers_to_transform` and `leave_out` keep.

    Args:
        config: a resolved config.
        paths: of the targets.
        modules: paths of all modules: the last layer is the model's, whether it is a target or not.
    """
    wanted, left_out = config.layers_to_transform, config.leave_out or []
    if wanted is None and not left_out:
        return set(paths)
    numbered = _numbered(paths)
    everywhere = _numbered(modules).values()
    if not numbered:
        raise ConfigError(
            f"layers_to_transform and leave_out need layers that are numbered in their paths; the targets are {paths}."
        )
    wanted = [wanted] if isinstance(wanted, int) else wanted
    kept, existing = set(), set()
    for stack in {stack for stack, _ in numbered.values()}:
        count = 1 + max(index for other, index in everywhere if other == stack)
        existing.update(range(-count, count))
        dropped = {index % count for index in left_out if -count <= index < count}
        kept.update(
            name
            for name, (other, index) in numbered.items()
            if other == stack and index not in dropped and (wanted is None or index in wanted)
        )
    unknown = sorted({index for index in wanted or () if index < 0} | ({*(wanted or ()), *left_out} - existing))
    if unknown:
        raise ConfigError(
            f"layers_to_transform and leave_out: there is no layer {', '.join(map(str, unknown))}; "
            f"layers count from 0 to {max(existing)} (or from the end, in leave_out: -1 is the last)."
        )
    return kept


def _numbered(paths: Iterable[str]) -> dict[str, tuple[str, int]]:
    """{path: (its stack, its layer)} of those in a layer."""
    found = {name: re.match(r"(?P<stack>.*?)\.(?P<index>\d+)(\.|$)", name) for name in paths}
    return {name: (place["stack"], int(place["index"])) for name, place in found.items() if place}


def _at_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})"


def _matches(pattern: str | Iterable[str] | None, name: str) -> bool:
    if isinstance(pattern, str):
        return fullmatch(pattern, name)
    return any(ends_with(name, ending) for ending in pattern or ())


def _model_type(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    return getattr(config, "model_type", None) or type(model).__name__


def _placement_for(config: BottleneckConfig, model: nn.Module) -> str:
    """What fits the kind at the user's own targets."""
    if config.kind == "parallel":
        return PARALLEL
    if config.kind == "houlsby":
        return OUTPUT
    found = [module for name, module in named_targets(model) if _matches(config.target_modules, name)]
    return NORM if found and all(_is_norm(module) for module in found) else BLOCK


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _width(name: str, module: nn.Module, model: nn.Module, *, embedding: bool = False) -> int:
    """The size of the hidden states that a module gives."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, nn.Embedding):
        return base.embedding_dim
    if _is_norm(base) and getattr(base, "weight", None) is not None:
        return base.weight.numel()
    if any(True for _ in base.parameters(recurse=False)):
        width = _get_in_out_features(base)[1]
        if width is not None:
            return width
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = (getattr(config, "embedding_size", None) if embedding else None) or getattr(config, "hidden_size", None)
    if width is None:
        raise ConfigError(
            f"target module {name} of type {type(base).__name__} does not say how wide its output is, and neither does "
            "the model's config (hidden_size). Name a linear layer, a norm or an embedding instead."
        )
    return width


def _unknown(model: nn.Module, model_type: str) -> str:
    return (
        f"it is not known where bottleneck adapters go in {model_type!r} (known: {', '.join(sorted(ANATOMIES))}). "
        'Name the modules with target_modules: for kind="pfeiffer" the norm behind the feed-forward\'s residual if the '
        'model has one there (placement="norm"), else the feed-forward module (placement="block"); for "houlsby" the '
        'last modules of attention and feed-forward (placement="output"); for "parallel" the feed-forward module '
        f'(placement="parallel"). {_candidates(dict(named_targets(model)))}'
    )


def _candidates(modules: dict[str, nn.Module]) -> str:
    """What a user may have meant: the names of modules inside numbered layers."""
    inside = {re.sub(r"^.*\.\d+\.", "", name): m for name, m in modules.items() if re.search(r"\.\d+\.", name)}
    norms = sorted(name for name, module in inside.items() if _is_norm(module))
    others = sorted(name for name, module in inside.items() if not _is_norm(module))
    return f"Its layers have the norms {norms[:12]} and the modules {others[:24]}."

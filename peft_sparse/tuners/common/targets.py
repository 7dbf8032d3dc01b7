"""From a config to the parameters of a model that it targets."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from peft import PeftConfig
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..._peft_bridge import AuxiliaryTrainingWrapper, BaseTunerLayer, _maybe_include_all_linear_layers
from ...core.names import ends_with, lies_in_trained_whole, path_of_layer, unwrapped
from ...errors import ConfigError
from ...selection.patterns import fullmatch, match
from .base_model import modules_around_adapters, outer_base_model_of
from .computed import computed_parameters, is_parametrization, refuse_computed
from .field_checks import ALL_LINEAR, ALL_PARAMETERS
from .layer import PARAMETERS
from .packed import find_backend, own_parameters, parameter_numel
from .target_checks import (
    check_names,
    no_linear,
    refuse_norms_by_name,
    warn_if_deeper,
    warn_of_exclusions,
    warn_of_stacks,
)

logger = logging.getLogger(__name__)

# {module path: names of its targeted parameters}, in the order of the model.
Targets = dict[str, tuple[str, ...]]


class TargetRequest(Protocol):
    """The fields of a config that say what it targets; see `SparseConfig`."""

    task_type: Any
    counts: dict[str, int] | None
    target_modules: list[str] | set[str] | str | None
    exclude_modules: list[str] | str | None
    target_biases: bool
    target_norms: bool | None
    target_parameters: list[str] | None
    layers_to_transform: list[int] | int | None
    layers_pattern: list[str] | str | None
    modules_to_save: list[str] | None


def find_targets(config: TargetRequest, model: nn.Module) -> Targets:
    """Which parameters of which modules a config targets.

    A config with `counts` (one that came from a file) names its parameters itself; the rules decide otherwise.

    Raises:
        ConfigError: a parameter of `counts` or of `target_parameters` is not in the model, or a layer of
            `layers_to_transform`; or a layer of another adapter type is around what is targeted.
    """
    modules = dict(named_targets(model))
    inside = list(_hidden_modules(model))
    hidden = {name: layer for name, _, layer in inside}
    if config.counts is not None:
        _refuse_hidden((parameter.rpartition(".")[0] for parameter in config.counts), hidden)
        # Before anything reads a weight: reading a spectral norm's changes it.
        refuse_computed({name: own for name, own in targets_of(config.counts).items() if name in modules}, modules)
        warn_if_deeper(config, config.counts, modules)
        return _from_counts(config.counts, modules)
    modules.update((name, module) for name, module, _ in inside)
    if config.target_norms is False:
        refuse_norms_by_name(config, {name: is_norm(module) for name, module in modules.items()})
    _check_layers_exist(config, modules)
    warn_of_exclusions(config.exclude_modules, modules)
    rules = [_module_rule(config, model, modules), _norm_rule(config), _parameter_rule(config, modules)]
    targets: Targets = {}
    for name, module in modules.items():
        if is_excluded(config, name) or is_left_out_norm(config, module) or not _in_layers(config, name):
            continue
        wanted = {parameter for rule in rules for parameter in rule(name, module)}
        present = tuple(p for p in PARAMETERS if p in wanted and _has_parameter(module, p))
        if present or (wanted and not any(_has_parameter(module, p) for p in PARAMETERS)):
            targets[name] = present
    _refuse_hidden(targets, hidden)
    refuse_computed(targets, modules)
    if not targets and config.target_modules in (None, ALL_LINEAR) and not _all_linear(config, model):
        raise no_linear(type(model).__name__)
    check_names(config.target_modules, modules, is_empty=not targets)
    if left_out := _stacks_left_out(config, modules, targets):
        warn_of_stacks(config.target_modules, left_out, total=model_numel(model))
    return targets


def named_targets(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the model itself, by path: tuner layers count as the module that they wrap; their insides do not
    count, nor what computes a module's weight for it.
    """
    # Modules come before what is inside of them, and that before all else, so the last tuner layer alone matters.
    inside: str | None = None
    for name, module in modules_around_adapters(model):
        if not name or (inside is not None and name.startswith(inside)):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or is_parametrization(module):
            inside = f"{name}."
        if isinstance(module, AuxiliaryTrainingWrapper) or is_parametrization(module):
            continue
        yield unwrapped(name), module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _hidden_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, BaseTunerLayer]]:
    """(path, module, layer) of the modules inside of what a tuner layer is around, such as a feed-forward with a
    bottleneck adapter. `named_targets` does not see them.
    """
    for path, layer in modules_around_adapters(model):
        if isinstance(layer, BaseTunerLayer):
            for inner, module in modules_around_adapters(layer.get_base_layer()):
                if inner:
                    yield path_of_layer(f"{path}.{inner}"), module, layer


def _refuse_hidden(targets: Iterable[str], hidden: dict[str, BaseTunerLayer]) -> None:
    """Refuse to target what lies inside of another type's layer.

    Raises:
        ConfigError: a target does.
    """
    for name in targets:
        if name in hidden:
            raise ConfigError(
                f"{name} lies inside of a module that carries adapters of another type, and would not be tuned. Load "
                f"{hidden[name]._all_available_adapter_names()} after this one, or merge or unload them first."
            )


def is_left_out_norm(config: TargetRequest, module: nn.Module) -> bool:
    """Whether a module is a norm, and the config tunes none."""
    return config.target_norms is False and is_norm(module)


def is_excluded(config: TargetRequest, name: str) -> bool:
    """Whether `exclude_modules` or `modules_to_save` keeps a module from being tuned sparsely."""
    excluded = config.exclude_modules
    if isinstance(excluded, str) and fullmatch(excluded, name):
        return True
    if not isinstance(excluded, str) and _ends_with_any(name, excluded or ()):
        return True
    return lies_in_trained_whole(name, config.modules_to_save or ())


def stored_target_modules(config: TargetRequest, targets: Targets) -> set[str] | str:
    """The user's `target_modules` in the forms that PEFT can do with: a set or a string, and no bare embedding names.

    PEFT saves the whole embedding matrix with every adapter whose config targets "embed_tokens" or "lm_head" by that
    name or by a regex.
    """
    requested = config.target_modules
    if requested is None:
        return set() if config.target_parameters else ALL_LINEAR
    embeddings = {name for name in targets if name.rpartition(".")[2] in ("embed_tokens", "lm_head")}
    if isinstance(requested, str):
        return set(targets) if embeddings and requested not in (ALL_LINEAR, ALL_PARAMETERS) else requested
    return {name for name in requested if name not in ("embed_tokens", "lm_head")} | embeddings


def _module_rule(config: TargetRequest, model: nn.Module, modules: dict[str, nn.Module]):
    """target_modules, with the biases if `target_biases` asks for them."""
    parts = PARAMETERS if config.target_biases else ("weight",)
    target = config.target_modules
    if target == ALL_PARAMETERS:
        root = base_prefix(model)
        seen: set[int] = set()
        # Fixed tables, which files of the model never hold (Marian's sines): a merged model would lose their change.
        unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        bypassed = sorted(name for name, module in modules.items() if _is_bypassed(module) and name.startswith(root))
        _warn_of_bypassed(ALL_PARAMETERS, [name for name in bypassed if not is_excluded(config, name)])

        def every(name: str, module: nn.Module) -> tuple[str, ...]:
            if name in bypassed:
                return ()
            parameters = own_parameters(module).items()
            own = {p: t for p, t in parameters if id(t) not in seen and f"{name}.{p}" not in unsaved}
            if not name.startswith(root):
                return ()
            seen.update(map(id, own.values()))
            # What cannot be tuned is wanted all the same, and refused by name: computed weights, other parameters.
            return (*own, *computed_parameters(module))

        return every
    if target is None and config.target_parameters:
        return lambda name, module: ()
    if target is None or target == ALL_LINEAR:
        linear = _all_linear(config, model)
        return lambda name, module: parts if name in linear else ()
    if isinstance(target, str):
        return lambda name, module: parts if fullmatch(target, name) else ()
    return lambda name, module: parts if _ends_with_any(name, target) else ()


def _norm_rule(config: TargetRequest):
    parts = PARAMETERS if config.target_biases else ("weight",)
    return lambda name, module: parts if config.target_norms and is_norm(module) else ()


def _parameter_rule(config: TargetRequest, modules: dict[str, nn.Module]):
    wanted = config.target_parameters or []
    for target in wanted:
        if not any(_ends_with_any(f"{name}.{p}", [target]) for name, m in modules.items() for p in own_parameters(m)):
            raise ConfigError(f"target_parameters: no parameter of the model ends with {target!r}.")
    return lambda name, module: tuple(p for p in own_parameters(module) if _ends_with_any(f"{name}.{p}", wanted))


def _from_counts(counts: dict[str, int], modules: dict[str, nn.Module]) -> Targets:
    targets: Targets = {}
    for parameter in counts:
        name, _, part = parameter.rpartition(".")
        if part not in PARAMETERS or name not in modules or not _has_parameter(modules[name], part):
            raise ConfigError(
                f"the adapter tunes {parameter!r}, which this model does not have. Load it into the architecture it "
                "was trained on (its config names it in base_model_name_or_path)."
            )
        if counts[parameter] > (numel := parameter_numel(modules[name], part)):
            raise ConfigError(
                f"counts: {counts[parameter]:,} tuned weights of {parameter!r} are claimed, of {numel:,} weights. "
                "Nothing was loaded. Download the adapter again, or load it into the model that it was trained on."
            )
        targets[name] = (*targets.get(name, ()), part)
    return {name: targets[name] for name in modules if name in targets}


def _all_linear(config: TargetRequest, model: nn.Module) -> set[str]:
    """The modules that PEFT's "all-linear" means, but those that are never called; the config is not touched."""
    scratch = PeftConfig(task_type=config.task_type)
    scratch.target_modules = ALL_LINEAR
    # PEFT leaves the output layer of a transformers model out, and does not know one that torch.compile has wrapped.
    model = outer_base_model_of(model)
    named = dict(modules_around_adapters(model))
    found = _maybe_include_all_linear_layers(scratch, model).target_modules
    bypassed = sorted(name for name in found if _is_bypassed(named.get(name)))
    _warn_of_bypassed(ALL_LINEAR, [name for name in bypassed if not is_excluded(config, unwrapped(name))])
    # Nor what is inside of another type's layer.
    hidden = {name for name, module, _ in _hidden_modules(model) if is_linear(module)}
    return hidden | {unwrapped(name) for name in found if name not in bypassed}


def _is_bypassed(module: nn.Module | None) -> bool:
    """Whether a module is the output of an `nn.MultiheadAttention`, which reads its weight and never calls it."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def _warn_of_bypassed(target: str, paths: list[str]) -> None:
    if paths:
        logger.warning("%s leaves out %s: nn.MultiheadAttention never calls it.", target, ", ".join(paths))


def _stacks_left_out(config: TargetRequest, modules: dict[str, nn.Module], targets: Targets) -> dict[str, int]:
    """{parameter: number of weights} of the stacks of matrices that `target_modules` means and nothing here tunes.

    Such are the experts of a mixture, fused into one parameter in three dimensions, which no linear layer holds.
    """
    wanted = config.target_modules
    if wanted == ALL_PARAMETERS or (wanted is None and config.target_parameters):
        return {}

    def is_meant(name: str) -> bool:
        if wanted in (None, ALL_LINEAR):
            return True
        # What was gate_proj and up_proj of each expert before they were fused.
        parts = [name, *(name.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj"))]
        if isinstance(wanted, str):
            return any(fullmatch(wanted, part) for part in parts)
        return any(_ends_with_any(part, wanted) for part in parts)

    return {
        f"{name}.{parameter}": tensor.numel()
        for name, module in modules.items()
        if name not in targets and not is_excluded(config, name) and _in_layers(config, name)
        for parameter, tensor in own_parameters(module).items()
        if _is_stack(module, tensor) and is_meant(f"{name}.{parameter}")
    }


def _is_stack(module: nn.Module, tensor: Tensor) -> bool:
    """Whether a parameter holds several matrices; a table of positions has a leading 1."""
    return tensor.dim() == 3 and min(tensor.shape) > 1 and not isinstance(module, _ConvNd)


def _wanted_layers(config: TargetRequest) -> list[int] | None:
    """The layers that a config names; None where it names none."""
    layers = config.layers_to_transform
    wanted = [layers] if isinstance(layers, int) else list(layers or ())
    return wanted or None


def _layer_of(config: TargetRequest, name: str) -> int | None:
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    list_name = rf"(?:{'|'.join(patterns)})" if patterns else r"[^.]+"
    found = match(rf"(?:.*?\.)??{list_name}\.(\d+)(?:\.|$)", name)
    return None if found is None else int(found[1])


def _in_layers(config: TargetRequest, name: str) -> bool:
    wanted = _wanted_layers(config)
    return wanted is None or _layer_of(config, name) in wanted


def _check_layers_exist(config: TargetRequest, modules: Iterable[str]) -> None:
    wanted = _wanted_layers(config)
    if wanted is None:
        return
    there = {layer for name in modules if (layer := _layer_of(config, name)) is not None}
    if unknown := sorted(set(wanted) - there):
        known = f"layers count from {min(there)} to {max(there)}" if there else "no module's path has a number"
        raise ConfigError(f"layers_to_transform: there is no layer {', '.join(map(str, unknown))}; {known}.")


def base_prefix(model: nn.Module) -> str:
    """Path of the model without its head, with a dot; empty if the model is not split that way."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def _has_parameter(module: nn.Module, parameter: str) -> bool:
    return parameter in own_parameters(module) or parameter in computed_parameters(module)


def _ends_with_any(name: str, endings) -> bool:
    return any(ends_with(name, ending) for ending in endings)


def parameters_of(targets: Targets) -> list[str]:
    """Names of all targeted parameters, in the order of the model."""
    return [f"{name}.{which}" for name, parts in targets.items() for which in parts]


def targets_of(parameters: Iterable[str]) -> Targets:
    """The targets that parameters of these names are."""
    targets: Targets = {}
    for parameter in parameters:
        name, _, which = parameter.rpartition(".")
        targets[name] = (*targets.get(name, ()), which)
    return targets


def model_numel(model: nn.Module) -> int:
    """Number of parameters of the base model: frozen ones included, tied ones once, adapters and copied heads not; a
    packed weight counts what it unpacks to.
    """
    own: dict[int, int] = {}

    def count(module: nn.Module) -> None:
        own.update((id(p), parameter_numel(module, name)) for name, p in own_parameters(module).items())
        for name, child in module.named_children():
            is_around = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
            if not is_around or name in ("base_layer", "original_module", "token_adapter"):
                count(child)

    count(model)
    return sum(own.values())


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer that can carry a delta.

    By class name; its parameters are `weight`, which a layer norm may have in more than one dimension, and perhaps
    `bias`.
    """
    names = {name for name, _ in module.named_parameters()}
    return "Norm" in type(module).__name__ and "weight" in names and names <= {"weight", "bias"}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one that LoRA would adapt as a linear layer."""
    return isinstance(module, (nn.Linear, Conv1D)) or find_backend(module) is not None

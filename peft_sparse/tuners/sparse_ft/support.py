"""From a request to supports: how many weights each tensor gets, and which ones where chance decides."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import nn

from ...errors import ConfigError
from ...selection.budget import Group, draw_counts, groups_of, total_from_request
from ...selection.criteria import random_indices
from .adapter_delta import AdapterDelta
from .config import SparseConfig
from .packed import own_parameters, parameter_numel, parameter_shape
from .targets import Targets, find_targets, named_targets
from .wrap import is_linear, wrapper_for


def plan(config: SparseConfig, model: nn.Module) -> tuple[Targets, dict[str, int] | None]:
    """The targets of a config on a model and, where they are known before training, the counts.

    Raises:
        ConfigError: whatever can be refused before the model is touched.
    """
    targets = find_targets(config, model)
    modules = dict(named_targets(model))
    for name, parameters in targets.items():
        wrapper_for(modules[name], name, parent=model.get_submodule(name.rpartition(".")[0]))
        if not parameters:
            raise ConfigError(
                f"target module {name} has neither a weight nor a bias to tune. Leave it out of target_modules."
            )
    # PEFT has a good error for an empty match, and gives it before it touches the model.
    return targets, plan_counts(config, targets, model) if targets else None


def plan_groups(config: SparseConfig, targets: Targets, model: nn.Module) -> list[Group]:
    """Groups of parameters with the number of weights that each group gets: the budget, applied to a model.

    Raises:
        ConfigError: the request is larger than the targets, or the budget's groups do not fit them.
    """
    modules = dict(named_targets(model))
    owners = {f"{name}.{p}": modules[name] for name, parts in targets.items() for p in parts}
    shapes = {name: parameter_shape(module, name.rpartition(".")[2]) for name, module in owners.items()}
    total = total_from_request(
        density=config.density,
        num_weights=config.num_weights,
        equivalent_rank=config.equivalent_rank,
        shapes=shapes,
        linear_names={name for name, module in owners.items() if len(shapes[name]) == 2 and is_linear(module)},
        density_of=config.density_of,
        model_numel=model_numel(model),
    )
    return groups_of(config.budget, total, {name: prod(shape) for name, shape in shapes.items()})


def plan_counts(config: SparseConfig, targets: Targets, model: nn.Module) -> dict[str, int] | None:
    """{parameter: number of weights}, or None where only training can tell.

    Raises:
        ConfigError: see `plan_groups`; or method "fixed" without the counts that only a file or a composition can give.
    """
    if config.counts is not None:
        return dict(config.counts)
    if config.method == "fixed":
        raise ConfigError(
            'method="fixed" has no way to select weights: it is what composed and imported adapters carry. Try "rand".'
        )
    groups = plan_groups(config, targets, model)
    if not config.starts_random and config.init_weights:
        return None
    modules = dict(named_targets(model))
    sizes = {f"{name}.{p}": parameter_numel(modules[name], p) for name, parts in targets.items() for p in parts}
    return draw_counts(groups, sizes, seed=getattr(config, "seed", 0))


def select_random(config: SparseConfig, deltas: Mapping[str, AdapterDelta]) -> None:
    """Give every delta a random support of its own size, and random values unless the adapter starts from the identity.

    The support of a parameter depends on the seed, its name and its count alone; the values come from torch's global
    generator, as those of PEFT's other tuners do.
    """
    seed = getattr(config, "seed", 0)
    for name, delta in deltas.items():
        # PEFT's low_cpu_mem_usage puts parameters on the meta device and leaves buffers where they are.
        if delta.values.is_meta:
            continue
        values = None if config.init_weights else torch.randn(delta.count)
        delta.set_support(random_indices(delta.numel, delta.count, seed=seed, name=name), values)


def model_numel(model: nn.Module) -> int:
    """Number of parameters of the base model: frozen ones included, tied ones once, adapters and copied heads not; a
    packed weight counts what it unpacks to.
    """
    inside = {"sparse_ft_weight", "sparse_ft_bias", "modules_to_save"}
    own: dict[int, int] = {}
    for path, module in model.named_modules():
        if not inside & set(path.split(".")):
            own.update((id(p), parameter_numel(module, name)) for name, p in own_parameters(module).items())
    return sum(own.values())

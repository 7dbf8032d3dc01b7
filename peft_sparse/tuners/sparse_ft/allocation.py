"""From a request to supports: how many weights each tensor gets, and which ones where chance decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...selection.budget import Group, bernoulli_counts, draw_counts, groups_of, total_from_request
from ...selection.rows import check_room, random_in_rows, room
from ..common.packed import parameter_shape
from ..common.target_checks import check_each
from ..common.targets import Targets, find_targets, is_linear, model_numel, named_targets, parameters_of
from .configs.base import CHANCE, NOTHING, WEIGHTS, SparseConfig
from .configs.one_shot import GivenConfig
from .known_support import checked_support, choose_by_weights, given_support
from .layers.delta import AdapterDelta
from .layers.dispatch import wrapper_for


@dataclass(frozen=True)
class Allocation:
    """What a config means on a model.

    Attributes:
        targets: what it tunes.
        counts: {parameter: number of weights}; None where only training can tell.
        chosen: {parameter: [k] indices} where they are known before the adapter is made, else None.
    """

    targets: Targets
    counts: dict[str, int] | None = None
    chosen: dict[str, Tensor] | None = None


def allocate(config: SparseConfig, model: nn.Module) -> Allocation:
    """The targets of a config on a model and, where they are known before training, counts and indices.

    A support that the user gives is put into `counts` of the config, which alone then says what is targeted.

    Raises:
        ConfigError: whatever can be refused before the model is touched.
        SelectionError: the base model's weights have no order.
    """
    support = given_support(config) if isinstance(config, GivenConfig) else None
    if support is not None:
        config.counts = {name: indices.numel() for name, indices in support.items()}
    targets = find_targets(config, model)
    modules = dict(named_targets(model))
    check_each(targets, lambda name: wrapper_for(modules[name], name))
    for name, parameters in targets.items():
        if not parameters:
            raise ConfigError(
                f"target module {name} has neither a weight nor a bias to tune. Leave it out of target_modules."
            )
    # PEFT has a good error for an empty match, and gives it before it touches the model.
    if not targets:
        return Allocation(targets)
    chosen = None
    if support is not None:
        chosen = checked_support(support, modules)
    elif config.counts is None and config.selected_by == WEIGHTS:
        chosen = choose_by_weights(config, plan_groups(config, targets, model), modules)
    if chosen is not None:
        return Allocation(targets, {name: chosen[name].numel() for name in parameters_of(targets)}, chosen)
    return Allocation(targets, plan_counts(config, targets, model))


def plan_groups(config: SparseConfig, targets: Targets, model: nn.Module) -> list[Group]:
    """Groups of parameters with the number of weights that each group gets: the budget, applied to a model.

    Raises:
        ConfigError: the request is larger than the targets or than the rows they may use, or the budget's groups do not
            fit them.
    """
    modules = dict(named_targets(model))
    shapes = shapes_of(targets, modules)
    total = total_from_request(
        density=config.density,
        num_weights=config.num_weights,
        equivalent_rank=config.equivalent_rank,
        shapes=shapes,
        linear_names={n for n, shape in shapes.items() if len(shape) == 2 and is_linear(modules[n.rpartition(".")[0]])},
        density_of=config.density_of,
        model_numel=model_numel(model),
    )
    groups = groups_of(config.budget, total, {name: prod(shape) for name, shape in shapes.items()})
    check_room(groups, shapes, config.support_rows)
    return groups


def plan_counts(config: SparseConfig, targets: Targets, model: nn.Module) -> dict[str, int] | None:
    """{parameter: number of weights}, or None where only training can tell.

    Raises:
        ConfigError: see `plan_groups`; or method "fixed" without the counts that only a file or a composition can give.
    """
    if config.counts is not None:
        return dict(config.counts)
    if config.selected_by == NOTHING:
        raise ConfigError(
            'method="fixed" has no way to select weights: it is what composed and imported adapters carry. Try "rand".'
        )
    groups = plan_groups(config, targets, model)
    if config.selected_by != CHANCE and config.init_weights:
        return None
    shapes = shapes_of(targets, dict(named_targets(model)))
    sizes = {name: room(config.support_rows, shape) for name, shape in shapes.items()}
    seed = getattr(config, "seed", 0)
    if getattr(config, "draw", "exact") == "exact":
        return draw_counts(groups, sizes, seed=seed)
    counts = bernoulli_counts(groups, sizes, seed=seed)
    if not any(counts.values()):
        raise ConfigError(
            f"draw='bernoulli' drew no weight at all with seed={seed}. Take another seed, a higher density, or "
            "draw='exact'."
        )
    return counts


def shapes_of(targets: Targets, modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """{parameter: its shape, unpacked} of everything that is targeted, in the order of the model."""
    owners = ((path, modules[path], which) for path, parts in targets.items() for which in parts)
    return {f"{path}.{which}": parameter_shape(module, which) for path, module, which in owners}


def set_supports(
    config: SparseConfig,
    deltas: Mapping[str, AdapterDelta],
    chosen: Mapping[str, Tensor] | None = None,
    *,
    adapter_name: str = "default",
) -> None:
    """Give every delta its support, and random values unless the adapter starts from the identity.

    Without `chosen` supports are random, see `stream_of`. Random values come from torch's global generator, as those of
    PEFT's other tuners do.
    """
    seed, stream = getattr(config, "seed", 0), stream_of(config, adapter_name)
    for name, delta in deltas.items():
        # PEFT's low_cpu_mem_usage puts parameters on the meta device and leaves buffers where they are.
        if delta.values.is_meta:
            continue
        values = None if config.init_weights else torch.randn(delta.count)
        if chosen is None:
            drawn = f"{name} for {stream}"
            indices = random_in_rows(delta.shape, delta.count, share=config.support_rows, seed=seed, name=drawn)
        else:
            indices = chosen[name]
        delta.set_support(indices, values)


def stream_of(config: SparseConfig, adapter_name: str) -> str:
    """What tells the random draws of one adapter from those of another with the same seed.

    Draws of one seed would lie inside each other: two adapters that are added up would change the same weights. So the
    method, the task, what was asked for and the adapter's name take part in the draw. Two adapters trained apart that
    agree in all of these, such as two language adapters called "default", need seeds or names of their own.
    """
    task = getattr(config.task_type, "value", config.task_type)
    asked = (config.density, config.num_weights, config.equivalent_rank)
    return f"{config.method}, {task}, {asked}, {adapter_name}"

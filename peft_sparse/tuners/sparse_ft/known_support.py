"""Supports that are known when an adapter is made: given by the user, or chosen by the base model's own weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...checkpoints.adapter_files import read_adapter
from ...core.indices import check_indices, index_dtype
from ...core.sharded import how_sharded
from ...errors import ConfigError
from ...selection.budget import Group
from ...selection.criteria import GradientMeans, resolve_criterion
from ...selection.lazy_tensors import LazyTensors
from ...selection.rows import RowConfinement
from ...selection.top_k import joint_top_k
from ..common.packed import dequantize, find_backend, parameter_numel
from .configs.one_shot import GivenConfig, OneShotConfig


def given_support(config: GivenConfig) -> dict[str, Tensor] | None:
    """{parameter: [k] int64 sorted indices} that the user names; None once they are in the adapter's own file.

    Raises:
        ConfigError: indices that are no integers, or no such adapter to copy them from.
        FormatError: that adapter is damaged, pickled, or no sparse one.
    """
    if isinstance(config.support, Mapping):
        return {name: _sorted(name, indices) for name, indices in config.support.items()}
    if config.counts is not None or config.support is None:
        return None
    return {name: _sorted(name, delta.indices) for name, delta in read_adapter(config.support).deltas.items()}


def checked_support(support: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Given indices in the dtype that their tensors take.

    Args:
        support: {parameter: [k] int64 sorted}; of parameters that the model has.
        modules: {path: module} of the base model.

    Raises:
        ConfigError: an index twice, or outside of its tensor.
    """
    checked = {}
    for name, indices in support.items():
        path, _, which = name.rpartition(".")
        numel = parameter_numel(modules[path], which)
        if indices.numel() and not 0 <= int(indices[0]) <= int(indices[-1]) < numel:
            raise ConfigError(
                f"support: indices of {name} must lie in [0, {numel}), the flat positions of its elements, got "
                f"{int(indices[0])} to {int(indices[-1])}."
            )
        checked[name] = indices.to(index_dtype(numel))
        try:
            check_indices(checked[name], numel, name=name)
        except ValueError as error:
            raise ConfigError(f"support: {error}.") from error
    return checked


def choose_by_weights(
    config: OneShotConfig, groups: list[Group], modules: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """{parameter: [k_i] indices} of the weights that score best by a criterion of the weights alone.

    Args:
        config: its criterion needs no gradients.
        groups: how many weights each group of parameters gets.
        modules: {path: module} of the base model.

    Raises:
        ConfigError: a weight is not in this process's memory, or packed in a way that cannot be dequantised.
        SelectionError: NaN in a weight, or in its scores.

    Cost: three passes over the scores of all targets; one tensor's scores (and dequantised weight) in memory at a time.
    """
    criterion = resolve_criterion(config.criterion)
    confinement = RowConfinement(config.support_rows)

    def score(name: str) -> Tensor:
        path, _, which = name.rpartition(".")
        weight = base_weight(modules[path], which, name=name)
        scores = check_scores(criterion.score(weight, GradientMeans(None, None, 0)), weight.shape, name=name)
        return confinement.confine(name, scores)

    chosen: dict[str, Tensor] = {}
    for group in groups:
        scores = LazyTensors(group.members, score)
        chosen.update(joint_top_k(scores, group.count, min_score=criterion.min_score))
    return confinement.in_whole(chosen)


def base_weight(module: nn.Module, which: str, *, name: str) -> Tensor:
    """A parameter of the base model as a plain tensor, dequantised if need be.

    Raises:
        ConfigError: it is on the meta device, sharded, or packed in a way that cannot be dequantised.
    """
    backend = find_backend(module) if which == "weight" else None
    if backend is not None:
        return dequantize(module, backend)
    weight: Tensor = getattr(module, which).detach()
    how = "on the meta device" if weight.is_meta else how_sharded(getattr(module, which))
    if how is not None:
        raise ConfigError(
            f"{name} is {how}, and the criterion looks at the weights themselves. Add the adapter to a model that is "
            "loaded, and whole."
        )
    return weight


def check_scores(scores: Tensor, shape: Sequence[int], *, name: str) -> Tensor:
    """The scores that a criterion gave, if they have the shape of the weight.

    Raises:
        ConfigError: they have not.
    """
    if not isinstance(scores, Tensor) or tuple(scores.shape) != tuple(shape):
        found = f"the shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise ConfigError(f"criterion must give scores of the weight's shape {tuple(shape)}, got {found} ({name}).")
    return scores


def _sorted(name: str, indices: object) -> Tensor:
    tensor = torch.as_tensor(indices).detach().cpu()
    if tensor.dim() != 1 or (tensor.numel() and (tensor.is_floating_point() or tensor.dtype == torch.bool)):
        raise ConfigError(
            f"support: indices of {name} must be a list of integers, flat row-major positions, got {tensor.dtype} of "
            f"shape {tuple(tensor.shape)}. Of a mask: mask.flatten().nonzero().squeeze(1)"
        )
    return tensor.to(torch.int64).sort().values

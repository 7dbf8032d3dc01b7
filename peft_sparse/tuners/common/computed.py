"""Weights that a module has none of, for it computes them from other parameters whenever it is called."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ...errors import ConfigError
from .layer import PARAMETERS
from .target_checks import shortest_exclusion


def computed_parameters(module: nn.Module) -> tuple[str, ...]:
    """Those of `PARAMETERS` that a module computes: by a parametrization of torch (weight_norm, spectral_norm,
    orthogonal), or by the older hooks of the same names and those of pruning.
    """
    return tuple(name for name in PARAMETERS if is_parametrized(module, name) or _is_hooked(module, name))


def _is_hooked(module: nn.Module, name: str) -> bool:
    # The hooks leave a plain tensor there, beside weight_g and weight_v, or weight_orig. HQQ's plain biases are alone.
    sources = any(own.startswith(f"{name}_") for own in module._parameters)
    return sources and isinstance(module.__dict__.get(name), Tensor)


def is_parametrization(module: nn.Module) -> bool:
    """Whether a module is the part of another that computes a parameter for it, and nothing to tune."""
    return isinstance(module, ParametrizationList)


def refuse_computed(targets: Mapping[str, tuple[str, ...]], modules: Mapping[str, nn.Module]) -> None:
    """Refuse to tune what a module computes anew in each forward: a delta on it would be lost.

    Args:
        targets: {path of a module: names of its parameters that are to be tuned}.
        modules: {path: module}, of all that is targeted.

    Raises:
        ConfigError: there are such parameters.
    """
    computed = {path: set(own).intersection(computed_parameters(modules[path])) for path, own in targets.items()}
    found = {path: sorted(names) for path, names in computed.items() if names}
    if not found:
        return
    listed = ", ".join(f"{path}.{name}" for path, names in found.items() for name in names)
    exclusion = shortest_exclusion(found, [path for path in targets if path not in found])
    removal = "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
    if not all(is_parametrized(modules[path]) for path in found):
        removal += ", or torch.nn.utils.remove_weight_norm, remove_spectral_norm or prune.remove for the older kinds"
    raise ConfigError(
        f"{listed}: computed from other parameters in each forward (weight norm, spectral norm, pruning and the like), "
        f"so that a delta would be lost. Leave the module out with exclude_modules={exclusion}, or have the model keep "
        f"the weight itself before the adapter is added ({removal})."
    )

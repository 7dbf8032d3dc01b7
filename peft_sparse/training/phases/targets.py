"""What a first phase finds in a model: the adapter's config, and every parameter that the adapter may tune."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn

from ..._peft_bridge import BaseTuner
from ...errors import ConfigError
from ...tuners.common.adapter_config import config_of
from ...tuners.sparse_ft.configs.base import SPARSE_FT, SparseConfig
from ...tuners.sparse_ft.iteration import iter_deltas
from ...tuners.sparse_ft.layers.base import SparseLayer
from ...tuners.sparse_ft.layers.delta import AdapterDelta
from ..frozen import frozen_adapter


@dataclass(frozen=True, eq=False)
class Target:
    """One parameter that an adapter may tune.

    Attributes:
        name: its name in the base model.
        layer: the layer around it.
        which: "weight" or "bias".
        delta: the adapter's delta on it.
    """

    name: str
    layer: SparseLayer
    which: str
    delta: AdapterDelta

    @property
    def module(self) -> nn.Module:
        """The module of the base model that holds the parameter."""
        layer: Any = self.layer
        return layer.get_base_layer()

    @property
    def parameter(self) -> nn.Parameter:
        """The base parameter as it is now."""
        return getattr(self.module, self.which)


def sparse_config(model: nn.Module, adapter_name: str) -> SparseConfig:
    """The model's own copy of the config of an adapter whose weights are to be selected.

    Raises:
        ConfigError: the model has no such adapter, or it is of another type.
    """
    way_out = "LotteryTicketConfig and OneShotConfig make adapters whose weights are selected."
    return config_of(model, adapter_name, SPARSE_FT, called="a sparse adapter", way_out=way_out)


def targets_of_adapter(model: nn.Module, adapter_name: str) -> list[Target]:
    """Every parameter that an adapter may tune."""
    return [Target(*found) for found in iter_deltas(model, adapter_name)]


def check_trains(adapter_name: str, targets: Sequence[Target]) -> None:
    """Raise a ConfigError if no value of an adapter could train once its weights are selected."""
    if targets and not any(target.delta.held_values.requires_grad for target in targets):
        raise frozen_adapter(adapter_name)


def refuse_wrapper(model: nn.Module) -> None:
    """Refuse what averages the gradients of the parameters that were trainable when it was made, and of no others."""
    if not isinstance(model, (PeftModel, BaseTuner)) and isinstance(getattr(model, "module", None), nn.Module):
        raise ConfigError(
            f"model must not be wrapped when its phase changes, got a {type(model).__name__}: it would not average the "
            "gradients of the weights that train from now on. Pass the model inside it (model.module), and wrap that "
            "anew for each phase."
        )


def check_active(adapter_name: str, target: Target) -> None:
    """Raise a ConfigError if an adapter does not act on a target, or another one is in its weights."""
    layer: Any = target.layer
    if adapter_name not in layer.active_adapters or layer.disable_adapters:
        raise ConfigError(
            f"adapter {adapter_name!r} must be active while its weights are selected (in its dense phase, or by "
            f"gradients): model.set_adapter({adapter_name!r})"
        )
    if layer.merged:
        raise ConfigError(
            f"adapters {layer.merged_adapters} are merged into {target.name}: model.unmerge_adapter() first."
        )

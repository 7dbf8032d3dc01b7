"""State dicts of a base layer while deltas are written into its parameters: they hold the base model's own weights."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...core.sharded import how_sharded
from ...errors import ConfigError

if TYPE_CHECKING:
    from .layer import WeightLayer


class StateDictHooks:
    """Hooks that are on a base layer while something is written into its parameters.

    Under `resident` a state dict is taken of, and loaded into, the base layer's own entries; the next forward writes
    the deltas in again. A merged layer shows what is merged, as PEFT's layers do, and takes no other weights in.

    Args:
        layer: around the base layer.
    """

    def __init__(self, layer: WeightLayer) -> None:
        self._ref = weakref.ref(layer)
        self._handles: list[RemovableHandle] = []
        # {parameter: how many held its memory before a state dict was taken}
        self.holders: dict[str, int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a base layer takes its hooks along, and belongs to no layer of ours.
        return _forget, ()

    @property
    def _layer(self) -> WeightLayer | None:
        return self._ref()

    def begin(self) -> None:
        """Something is written into the base layer's parameters from now on."""
        if not self._handles and self._layer is not None:
            base = self._layer.get_base_layer()
            self._handles = [
                base.register_state_dict_pre_hook(self.before_saving),
                base.register_load_state_dict_pre_hook(self.before_loading),
            ]

    def end(self) -> None:
        """Take the hooks off: nothing is written into the parameters any more, or the layer leaves the model.

        Where nothing is written they do nothing.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before_saving(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        layer = self._layer
        if layer is None or layer.merged:
            return
        written = list(layer._written)
        layer.restore()
        self.holders.update({name: _num_holders(getattr(module, name)) for name in written})

    def before_loading(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        layer = self._layer
        if layer is None:
            return
        if not layer.merged:
            layer.restore()
        elif any(f"{prefix}{name}" in state_dict for name in module._parameters):
            raise ConfigError(
                f"base weights cannot be loaded while adapters are merged into them ({prefix}): call unmerge_adapter() "
                "first, or load the adapter's own tensors alone (set_peft_model_state_dict)."
            )

    def keep(self, parameter: str) -> None:
        """Before a delta is written: leave a state dict that still shares the parameter's memory as it is.

        Cost: a copy of the parameter, if there is such a state dict.
        """
        before = self.holders.pop(parameter, None)
        if before is None or self._layer is None:
            return
        own = getattr(self._layer.get_base_layer(), parameter)
        if how_sharded(own) is None and _num_holders(own) > before:
            own.data = own.data.clone()


class _Nobody:
    """What hooks of a copy refer to."""


def _forget() -> StateDictHooks:
    hooks = StateDictHooks.__new__(StateDictHooks)
    hooks._ref, hooks._handles, hooks.holders = weakref.ref(_Nobody()), [], {}
    return hooks


def _num_holders(tensor: Tensor) -> int:
    """How many tensors share the memory of one."""
    count: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]
    return count

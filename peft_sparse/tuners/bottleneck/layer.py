"""The tuned layer: holds the adapters of one site, and applies the active ones one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..._peft_bridge import BaseTunerLayer
from ...errors import ConfigError
from ..common.base_module import LikeItsBase, attribute_of, home_of
from ..common.kept_dtype import undo_cast
from ..common.mixed_batches import NamedRows
from .adapter import Bottleneck, init_linears
from .applying import PerExample, apply, attach
from .config import BottleneckConfig
from .invertible import COUPLINGS
from .placement import INVERTIBLE, Site

# The attribute that holds a layer's adapters; transformers looks for the prefix of the tuner type in it.
ADAPTERS = "bottleneck_adapters"
# Attribute of the parameters that are an adapter's own; what takes their place for a while does not have it.
_OWN = "_peft_sparse_own"


class BottleneckLayer(NamedRows, LikeItsBase, BaseTunerLayer):
    """Stands around the module of a site; see `placement.py` for what happens there.

    Attributes:
        bottleneck_adapters: {adapter name: `Bottleneck`, or a `Coupling` behind the embeddings}.
        placements: {adapter name: what it does here}.
    """

    adapter_layer_names = (ADAPTERS,)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.add_module(self.adapter_layer_names[0], nn.ModuleDict())
        self.placements: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # {adapter name: the dtype that it is meant to have}
        self._dtypes: dict[str, torch.dtype] = {}
        # What hooks this layer into modules around it: {placement: handles}.
        self.hooks: dict[str, list[RemovableHandle]] = {}
        # Device and dtype of the model around this layer: dropouts have no parameter to read them off.
        self._around = (torch.device("cpu"), torch.float32)
        # PEFT's own checks read them off every tuned layer.
        self.in_features = self.out_features = None

    @property
    def adapters(self) -> nn.ModuleDict:
        """{adapter name: module}, under whatever name the tuner type keeps them."""
        return self._modules[self.adapter_layer_names[0]]

    def update_layer(self, adapter_name: str, config: BottleneckConfig, *, site: Site, parent: nn.Module) -> None:
        """Give this site a new adapter with its starting values.

        Args:
            adapter_name: its name.
            config: its resolved config.
            site: what it does here, and how wide the hidden states are.
            parent: the module that holds the site's module.
        """
        placement, width = site.placement, site.width
        self._around = _around(parent, self.adapter_layer_names[0])
        # In evaluation too if the model is: nothing may be dropped by an adapter that is added to be used.
        adapter = self.new_adapter(adapter_name, config, site).train(self.base_layer.training)
        self.adapters[adapter_name] = adapter
        self._dtypes[adapter_name] = _dtype_of(adapter)
        self._mark_own()
        self.placements[adapter_name] = placement
        self.in_features = self.out_features = width
        if placement not in self.hooks:
            self.hooks[placement] = attach(self, placement, parent)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def new_adapter(self, adapter_name: str, config: BottleneckConfig, site: Site) -> nn.Module:
        """The module of a new adapter at this site."""
        return make_adapter(config, placement=site.placement, width=site.width, device=self._device())

    def built_in(self, adapter_name: str) -> nn.Module:
        """The plain module that computes what an adapter computes here, for a model without PEFT."""
        return self.adapters[adapter_name]

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.placements.pop(adapter_name, None)
        self._dtypes.pop(adapter_name, None)

    def at(self, placement: str, adapters: Sequence[str] | None = None) -> list[Any]:
        """What acts at a placement now, in order: the adapters of that name that this site has.

        Args:
            placement: the placement.
            adapters: names; the active ones if None, or those of the mixed batch that is being computed.
        """
        rows = self.row_names if adapters is None else None
        if rows is not None:
            chosen = {name: found[0] for name in rows if (found := self.at(placement, [name]))}
            return [PerExample(rows, chosen, replaces=placement == INVERTIBLE)] if chosen else []
        if adapters is None:
            adapters = [] if self.disable_adapters else self.active_adapters
        held = self.adapters
        chosen = [name for name in adapters if name in held and self.placements[name] == placement]
        if torch.is_grad_enabled():
            self.keep_dtypes(chosen, in_forward=True)
        return [held[name] for name in chosen]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's output with what the active adapters make of it."""
        return apply(self.base_layer, self, args, kwargs)

    def _attribute_of_base(self, name: str) -> Any:
        found = attribute_of(self.base_layer, name, lambda: self.base_layer)
        if "forward" in name and callable(found):
            raise ConfigError(
                f"{name}() of a {type(self.base_layer).__name__} computes past the bottleneck adapters around it: call "
                "the module, or layer.base_layer for the base model's own."
            ) from None
        return found

    def detach_hooks(self) -> None:
        """Take this layer out of the modules around it."""
        for handles in self.hooks.values():
            for handle in handles:
                handle.remove()
        self.hooks.clear()

    def _device(self) -> torch.device:
        parameter = next(self.base_layer.parameters(), None)
        if parameter is None:
            return self._around[0]
        owner = next(m for m in self.base_layer.modules() if any(p is parameter for p in m._parameters.values()))
        return home_of(owner, parameter)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the dtype of the weight, and finds no device where the base module has no weight.
        if adapter_name in self.adapters:
            adapter = self.adapters[adapter_name]
            if not any(parameter.is_meta for parameter in adapter.parameters()):
                adapter.to(device if device is not None else self._device())

    def cast(self, adapter_name: str) -> None:
        """Bring an adapter to the base model's dtype, which PEFT does where `autocast_adapter_dtype` is False."""
        if adapter_name in self.adapters:
            self.adapters[adapter_name].to(self._around[1])
            self._dtypes[adapter_name] = self._around[1]

    def keep_dtypes(self, adapters: Iterable[str] | None = None, *, in_forward: bool = False) -> None:
        """Undo casts of adapters that nobody asked for: see `undo_cast`.

        A hypernetwork would suffer most: in bfloat16 an embedding of size 1 does not move by less than 0.004. Tensors
        that FSDP puts in the place of a parameter are left alone.

        Args:
            adapters: names; the active ones if None.
            in_forward: see `undo_cast`.
        """
        for name in self.active_adapters if adapters is None else adapters:
            if name in self.adapters:
                for parameter in self.adapters[name].parameters():
                    if parameter.dtype != self._dtypes[name] and getattr(parameter, _OWN, False):
                        what = "The weights of a bottleneck adapter"
                        undo_cast(parameter, self._dtypes[name], what=what, in_forward=in_forward)

    def _mark_own(self) -> None:
        for parameter in self.adapters.parameters():
            setattr(parameter, _OWN, True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BottleneckLayer:
        before = {name: _dtype_of(adapter) for name, adapter in self.adapters.items()}
        super()._apply(fn, recurse)
        for name, adapter in self.adapters.items():
            if _dtype_of(adapter) != before[name]:
                self._dtypes[name] = _dtype_of(adapter)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copies of parameters lose their attributes.
        super().__setstate__(state)
        self._mark_own()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(CANNOT_MERGE)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No weight is changed that LoRA could approximate."""
        return False


CANNOT_MERGE = (
    "bottleneck adapters cannot be merged: they are functions with a nonlinearity, which no weight of the base model "
    "can take in. merge_and_unload() gives a model of plain modules that has them built in."
)


def _around(parent: nn.Module, adapters: str) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a module's parameters, adapters not counted; float32 where all of them are packed."""
    device = None
    for path, module in parent.named_modules():
        if f"{adapters}." in f"{path}.":
            continue
        for parameter in module.parameters(recurse=False):
            device = device or home_of(module, parameter)
            if parameter.is_floating_point():
                return home_of(module, parameter), parameter.dtype
    return device or torch.device("cpu"), torch.float32


def _dtype_of(adapter: nn.Module) -> torch.dtype:
    return next(adapter.parameters()).dtype


def make_adapter(
    config: BottleneckConfig, *, placement: str, width: int, device: torch.device | None = None
) -> nn.Module:
    """A new adapter module with its starting values, in float32."""
    if placement == INVERTIBLE:
        coupling = COUPLINGS[config.invertible](
            width,
            activation=config.activation,
            reduction_factor=config.invertible_reduction_factor,
            device=device,
        )
        coupling.reset(init=config.init, random=not config.init_weights)
        return coupling
    bottleneck = Bottleneck(
        width,
        config.size_for(width),
        activation=config.activation,
        scaling=config.scaling,
        dropout=config.dropout,
        device=device,
    )
    init_linears(bottleneck.down, bottleneck.up, init=config.init, random=not config.init_weights)
    return bottleneck

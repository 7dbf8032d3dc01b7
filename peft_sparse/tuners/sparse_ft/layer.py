"""What every tuned layer shares: its adapters' deltas, and writing them into the base parameters and out again, bit for
bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn

from ...core.observer import GradientObserver
from ...core.overlay import Overlay, add_deltas
from ...core.sharded import how_sharded, is_sharded
from ..weight_layer import WeightLayer, not_finite, not_whole
from .adapter_delta import AdapterDelta
from .packed import parameter_device, parameter_shape

# The tensors of a layer that can carry a delta, and the attribute that holds their adapters.
PARAMETERS = ("weight", "bias")


@dataclass
class Written:
    """A delta that stands in a base parameter right now, and what undoes it.

    Attributes:
        key: the adapters and the versions of their supports.
        overlay: where it stands.
        originals: [u] the parameter's own entries there; None when the whole parameter was exchanged.
        parameter: the exchanged parameter; None when the entries were written in place.
        shape: of what was written into.
    """

    key: tuple[Any, ...]
    overlay: Overlay
    originals: Tensor | None = None
    parameter: nn.Parameter | None = None
    shape: tuple[int, ...] = ()


class SparseLayer(WeightLayer):
    """Base class of the tuned layers: holds `AdapterDelta`s per adapter and applies them to the base layer's own
    parameters.

    A subclass says in `_delta_forward` how the layer computes with deltas in it.
    """

    adapter_layer_names = ("sparse_ft_weight", "sparse_ft_bias")
    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.sparse_ft_weight = nn.ModuleDict()
        self.sparse_ft_bias = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # Whether the forward may write the active deltas into the base weight (see `resident`).
        self.is_resident = False
        # Names of parameters that another module shares (tied embeddings): never written in place.
        self.tied_parameters: set[str] = set()
        self._written: dict[str, Written] = {}
        self._overlays: dict[tuple[Any, ...], Overlay] = {}
        base = self.get_base_layer()
        with warnings.catch_warnings():
            # PEFT does not know norms and says so.
            warnings.simplefilter("ignore")
            self.in_features, self.out_features = _get_in_out_features(base)
        self.num_embeddings = getattr(base, "num_embeddings", None)

    # ---- adapters --------------------------------------------------------------------------------

    def deltas_of(self, parameter: str) -> nn.ModuleDict:
        """{adapter name: AdapterDelta} of one tensor, "weight" or "bias"."""
        return getattr(self, f"sparse_ft_{parameter}")

    def update_layer(
        self, adapter_name: str, counts: dict[str, int], *, dtype: torch.dtype, inference_mode: bool
    ) -> None:
        """Give this layer a new adapter.

        Args:
            adapter_name: its name.
            counts: {"weight" or "bias": number of weights}; their indices come later.
            dtype: dtype of the values.
            inference_mode: whether the adapter starts frozen.
        """
        base = self.get_base_layer()
        for parameter, count in counts.items():
            shape, device = parameter_shape(base, parameter), parameter_device(base, parameter)
            self.deltas_of(parameter)[adapter_name] = AdapterDelta(shape, count, dtype=dtype, device=device)
        self._overlays.clear()
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def active_deltas(self, parameter: str, adapters: Sequence[str] | None = None) -> list[AdapterDelta]:
        """The deltas on one tensor that take part in a forward, of `adapters` (None: the active ones), in order."""
        held = self.deltas_of(parameter)
        names = self.active_adapters if adapters is None else adapters
        return [held[name] for name in names if name in held and held[name].takes_part]

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer, out of the base parameters first if it stands there."""
        if not self.merged:
            self.restore()
        super().delete_adapter(adapter_name)
        self._overlays.clear()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the weight's dtype, which would round float32 values over a bfloat16 weight.
        for parameter in PARAMETERS:
            if adapter_name in self.deltas_of(parameter):
                target = device if device is not None else parameter_device(self.get_base_layer(), parameter)
                delta = self.deltas_of(parameter)[adapter_name]
                if not delta.values.is_meta:
                    delta.to(target)

    # ---- forward ---------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            self.restore()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        if not any(self.active_deltas(parameter) for parameter in PARAMETERS):
            self.restore()
            return self.base_layer(x, *args, **kwargs)
        if torch.is_grad_enabled():
            self.keep_dtypes(in_forward=True)
        return self._delta_forward(self.active_adapters, x, *args, **kwargs)

    def keep_dtypes(self, *, in_forward: bool = False) -> None:
        """Undo casts of the active adapters' values that nobody asked for: see `AdapterDelta.keep_dtype`."""
        for parameter in PARAMETERS:
            for delta in self.active_deltas(parameter):
                if delta.values.dtype != delta.values_dtype:
                    delta.keep_dtype(in_forward=in_forward)

    def acts(self, adapter_name: str) -> bool:
        return any(self.active_deltas(parameter, [adapter_name]) for parameter in PARAMETERS)

    def effective(self, parameter: str, adapters: Sequence[str]) -> Tensor | None:
        """The tensor with its deltas in it, differentiable in both; the tensor itself where there is no delta (None if
        it has none).
        """
        base = self.base_tensor(parameter)
        deltas = self.active_deltas(parameter, adapters)
        if not deltas:
            return base
        result = add_deltas(base, [(d.values, d.indices) for d in deltas])
        for delta in deltas:
            if delta.observer is not None and result.requires_grad:
                result.register_hook(partial(_show_gradient, delta.observer))
        return result

    def base_tensor(self, parameter: str) -> Tensor | None:
        """The base layer's own tensor, dequantised if need be; None if it has none."""
        return getattr(self.get_base_layer(), parameter)

    # ---- writing into the base parameters --------------------------------------------------------

    def overlay(self, parameter: str, adapters: Sequence[str]) -> tuple[tuple[Any, ...], Overlay]:
        """The union of the adapters' supports on one tensor, and a key that changes when any support does."""
        deltas = self.active_deltas(parameter, adapters)
        key = (parameter, *((id(d), d.support_version, d.indices.device) for d in deltas))
        if key not in self._overlays:
            self._overlays = {k: v for k, v in self._overlays.items() if k[0] != parameter}
            self._overlays[key] = Overlay([d.indices for d in deltas])
        return key, self._overlays[key]

    def pristine(self, parameter: str, overlay: Overlay) -> Tensor:
        """[u] the parameter's own entries at the overlay's indices, whatever is written into it now."""
        own = self.base_tensor(parameter)
        written = self._written.get(parameter)
        if written is None:
            return flat(own)[overlay.indices]
        if written.parameter is not None:
            return flat(written.parameter)[overlay.indices]
        copy = flat(own).clone()
        copy[written.overlay.indices] = written.originals.to(device=copy.device, dtype=copy.dtype)
        return copy[overlay.indices]

    def write(self, parameter: str, adapters: Sequence[str]) -> None:
        """Put the adapters' deltas into the base parameter, or bring what stands there up to date."""
        base = self.get_base_layer()
        values = [d.values for d in self.active_deltas(parameter, adapters)]
        if not values:
            self.restore(parameter)
            return
        key, overlay = self.overlay(parameter, adapters)
        written = self._written.get(parameter)
        if written is None or written.key != key:
            self.restore(parameter)
            written = self._begin_write(parameter, key, overlay)
        own = written.parameter
        originals = written.originals if own is None else flat(own)[overlay.indices]
        overlay.write_(flat(getattr(base, parameter)), values, originals=originals)

    def _begin_write(self, parameter: str, key: tuple[Any, ...], overlay: Overlay) -> Written:
        base = self.get_base_layer()
        own = getattr(base, parameter)
        if parameter in self.tied_parameters:
            written = Written(key, overlay, parameter=own)
            setattr(base, parameter, nn.Parameter(own.detach().clone(), requires_grad=False))
        else:
            written = Written(key, overlay, originals=self.pristine(parameter, overlay), shape=tuple(own.shape))
        self._written[parameter] = written
        return written

    def restore(self, parameter: str | None = None) -> None:
        """Take whatever is written out of the base parameters (of one, or of all), bit for bit."""
        for name in PARAMETERS if parameter is None else (parameter,):
            written = self._written.pop(name, None)
            if written is None:
                continue
            if written.parameter is not None:
                setattr(self.get_base_layer(), name, written.parameter)
            elif _is_all_there(own := getattr(self.get_base_layer(), name), written.shape):
                # Otherwise it stood in a copy that FSDP gathered for a pass and has thrown away since.
                base = flat(own)
                base[written.overlay.indices] = written.originals.to(device=base.device, dtype=base.dtype)

    # ---- merging ---------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base parameters until `unmerge`.

        Args:
            safe_merge: check first that the result is finite.
            adapter_names: the adapters to merge; the active ones if None.

        Raises:
            ValueError: `safe_merge` found a NaN or an infinity; the layer is as it was.
            ConfigError: this process holds only a part of the weights.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        if not adapter_names:
            return
        present = [name for name in adapter_names if any(name in self.deltas_of(p) for p in PARAMETERS)]
        self.refuse_parts(present)
        if safe_merge:
            self.check_finite([*self.merged_adapters, *present])
        self.merged_adapters.extend(present)
        for parameter in PARAMETERS:
            self.write(parameter, self.merged_adapters)

    def refuse_parts(self, adapters: Sequence[str], name: str = "this layer") -> None:
        """Raise a ConfigError if a tensor that `adapters` tune is not whole in this process; changes nothing."""
        for parameter in PARAMETERS:
            own = getattr(self.get_base_layer(), parameter, None)
            for delta in self.active_deltas(parameter, adapters):
                how = how_sharded(own)
                if is_sharded(own) or (how is not None and not _is_all_there(own, delta.shape)):
                    raise not_whole(f"{parameter} of {name}", how)

    def check_finite(self, adapters: Sequence[str]) -> None:
        for parameter in PARAMETERS:
            values = [delta.values for delta in self.active_deltas(parameter, adapters)]
            if not values:
                continue
            _, overlay = self.overlay(parameter, adapters)
            merged = overlay.entries(self.pristine(parameter, overlay), values)
            if not bool(torch.isfinite(merged).all()):
                overflows = all(bool(torch.isfinite(v).all()) for v in values)
                why = f"weight + delta overflows {merged.dtype}" if overflows else "it holds NaN or infinite values"
                raise not_finite(adapters, why)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The adapter's delta on the weight as a dense tensor, zeros where this layer has none of it."""
        base = self.get_base_layer()
        for delta in self.active_deltas("weight", [adapter_name]):
            return delta.delta.to_dense()
        shape, device = parameter_shape(base, "weight"), parameter_device(base, "weight")
        return torch.zeros(shape, dtype=torch.float32, device=device)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT can approximate this layer's adapter by LoRA: it can for linear weights."""
        return False


def _show_gradient(observer: GradientObserver, gradient: Tensor) -> None:
    """Hand a dense gradient, or what is wanted of it, to an observer."""
    wanted = observer.wanted()
    whole = gradient.detach().reshape(-1).to(torch.promote_types(gradient.dtype, torch.float32))
    observer.receive(whole if wanted is None else whole[wanted.long()])


def _is_all_there(parameter: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is in this process's memory as a whole."""
    return not is_sharded(parameter) and tuple(parameter.shape) == shape and parameter.untyped_storage().size() > 0


def flat(parameter: Tensor) -> Tensor:
    """A one-dimensional view of a parameter's memory, row-major, outside autograd."""
    data = parameter.data
    if not data.is_contiguous():
        raise ValueError(
            "a delta can only be written into a contiguous tensor, "
            f"got shape {tuple(data.shape)} with strides {data.stride()}. "
            "Make it contiguous first: module.weight.data = module.weight.data.contiguous()"
        )
    return data.view(-1)

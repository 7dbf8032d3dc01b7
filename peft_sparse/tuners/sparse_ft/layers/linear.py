"""Sparse deltas on linear layers: `nn.Linear` and transformers' `Conv1D`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, nn
from torch._C import _get_tracing_state
from torch.compiler import is_compiling

from ...._peft_bridge import BaseTunerLayer
from ....core import ops
from ....core.backends.native import kernels
from ....core.few_rows import GetParts, Parts, add_parts_, takes_parts
from ....core.overlay import Overlay
from ....core.traced import is_traced, shown
from ....errors import ConfigError
from ...common.base_module import called, has_hooks, offload_hook, output_of, output_without_hooks, own_forward
from .active_weights import ActiveWeights, Snapshot
from .base import PARAMETERS, SparseLayer
from .bounded_cache import with_entry
from .delta import AdapterDelta
from .in_place import DTYPES, Written, can_be_put_back, has_own_memory


class Linear(SparseLayer):
    """A linear layer with sparse deltas on its weight and bias.

    The class name holds "Linear" because PEFT finds the targets of a second "all-linear" adapter by it.

    Args:
        base_layer: the layer to tune.
        fan_in_fan_out: the weight is stored as [in, out] (transformers' `Conv1D`) instead of [out, in].
    """

    def __init__(self, base_layer: nn.Module, *, fan_in_fan_out: bool = False) -> None:
        super().__init__(base_layer)
        self.fan_in_fan_out = fan_in_fan_out

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if type(x) is Tensor and adapter_names is None and not (args or kwargs or is_grad_enabled() or is_compiling()):
            result = self._without_gradient(x)
            if result is not None:
                return result
        if self.num_resident and ops.is_kept():
            raise ConfigError(
                "a model cannot be exported or traced inside of resident(model): the program would use weights that "
                "later forwards write the deltas into, and add the deltas once more. Do it outside of the block."
            )
        return super().forward(x, *args, adapter_names=adapter_names, **kwargs)

    def _without_gradient(self, x: Tensor) -> Tensor | None:
        """The output of a forward that records no gradient, if it needs no more than the base layer and the deltas.

        A token calls every layer, and all that it touches beside the weight has left the caches since the last one.
        So little is asked: that the values and the weight are plain parameters, which none of torch's transforms has
        in its hands, and what those want of `x` the base layer gives.
        """
        if self._disable_adapters or self.moved is not None or _get_tracing_state() is not None:
            return None
        base = self._modules["base_layer"]
        if self.merged_adapters:
            return output_of(base, x)
        active, writes = self._active, self._writing.begun
        if active is None or not active.holds(base._parameters.get("weight"), self._active_adapter):
            active = self._active = self.acting(base, self._active_adapter)
        if active is None or has_hooks(base):
            return None
        result = None
        if self.num_resident:
            if not self._writing.depth and active.is_written_in(self._written):
                result = output_of(base, x)
        elif not self._writing.depth and "weight" not in self._written:
            result = active.with_few_rows(base, x)
        # Nothing was locked; had another thread begun to write, it would have counted first.
        return self._locked_output(active, base, x) if result is None or self._writing.begun != writes else result

    def _locked_output(self, active: ActiveWeights, base: nn.Module, x: Tensor) -> Tensor | None:
        """The output in resident mode, whatever is written into the weight now; None outside of it."""
        with self._lock:
            if not self.num_resident:
                return None
            if not active.is_written_in(self._written):
                if not self._exchanged(active):
                    self.write_entries("weight", active.key, active.overlay, active.values)
                self._written["weight"].snapshot = Snapshot(active, active.values)
            return output_of(base, x)

    def _exchanged(self, active: ActiveWeights) -> bool:
        """Restore what is written into the weight and write what acts now, in one pass each; False if neither is done.

        `write_entries` does the same in three passes, and takes the hooks of state dicts off and puts them on again.
        """
        native, before, holders = kernels(), self._written.get("weight"), self._base_state_hooks.holders
        if native is None or before is None or before.key == active.key or "weight" in holders:
            return False
        weight, values = active.weight, active.total()
        if values is None or not can_be_put_back(before, weight) or not is_writable(active):
            return False
        kept = torch.empty(values.numel(), dtype=weight.dtype)
        with self._writing:
            native.write_back_([(weight, before.overlay.support, before.originals, None)])
            native.keep_and_write_([(weight, active.overlay.support, kept, values)])
            now = Written(active.key, active.overlay, originals=kept, shape=active.shape, target=weight)
            self._written["weight"] = now
        return True

    def acting(self, base: nn.Module, names: str | list[str]) -> ActiveWeights | None:
        """The deltas of some adapters on the weight of `base`, the base layer, if that and they are all that acts."""
        key = names if isinstance(names, str) else tuple(names)
        active = self._named.get(key)
        if active is None or not active.holds(base._parameters.get("weight"), names):
            active = self._find_active(base, names)
            if active is not None:
                # Each of several adapters holds a union.
                unions = [k for k in self._named if not isinstance(k, str) and len(k) > 1]
                self._named = with_entry(self._named, key, active, counted=unions)
        return active

    def _find_active(self, base: nn.Module, names: str | list[str]) -> ActiveWeights | None:
        """The deltas of some adapters, if the base layer and they are all that acts."""
        weight, adapters = base._parameters.get("weight"), [names] if isinstance(names, str) else names
        if type(weight) is not nn.Parameter or isinstance(base, BaseTunerLayer) or "weight" in self.tied_parameters:
            return None
        deltas = self.active_deltas("weight", adapters)
        if not deltas or tuple(weight.shape) != deltas[0].shape or self.active_deltas("bias", adapters):
            return None
        held = [self.deltas_of(part) for part in PARAMETERS]
        watched = [part[name] for part in held for name in adapters if name in part]
        key, overlay = self.overlay("weight", adapters)
        active = ActiveWeights(
            weight,
            deltas[0].shape,
            names,
            deltas,
            key=key,
            overlay=overlay,
            watched=watched,
            fan_in_fan_out=self.fan_in_fan_out,
        )
        return active if active.holds(weight, names) else None

    def _mixed_rows(self, adapter_names: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if type(x) is Tensor and not (args or kwargs or is_grad_enabled() or is_compiling()):
            result = self._mixed_by_kernels(adapter_names, x)
            if result is not None:
                return result
        return super()._mixed_rows(adapter_names, x, *args, **kwargs)

    def _mixed_by_kernels(self, adapter_names: list[str], x: Tensor) -> Tensor | None:
        """The base layer's output for all examples, and what each one's deltas add to it, if kernels can add it."""
        self.restore()
        base, writes = self._modules["base_layer"], self._writing.begun
        if self._writing.depth or self._written:
            return None  # another thread writes, or has written by now
        rows, found = x.numel() // max(1, len(x) * x.shape[-1]), []
        for name, first, count in _runs(adapter_names):
            if not self.acts(name):
                continue
            active = self.acting(base, name)
            if active is None:
                return None
            product = active.product_with(x, count * rows)
            if product is None:
                return None
            found.append((first * rows, count * rows, *product))
        y, x = output_without_hooks(base, x), x.contiguous()
        if y.dtype is not x.dtype or not y.is_contiguous():
            return None
        for first, count, product, values in found:
            product.add_(y, x, count, base.weight, values, first_row=first)
        return None if self._writing.depth or self._writing.begun != writes else y

    def _untuned(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        if self.base_layer is base and self._has_later_backward(x, args, kwargs):
            return called(base, self._untuned_with_backward, (x,), {})
        return super()._untuned(x, *args, **kwargs)

    def _untuned_rows(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._has_later_backward(x, args, kwargs):
            return self._untuned_with_backward(x)
        with self._lock:
            return super()._untuned_rows(x, *args, **kwargs)

    def _has_later_backward(self, x: Tensor, args: Any, kwargs: Any) -> bool:
        """Whether the base layer's own product would need the weight again, which other forwards may write into."""
        if not (is_grad_enabled() and x.requires_grad) or args or kwargs or not self.has_own("weight"):
            return False
        base = self.get_base_layer()
        return own_forward(base) is None and not (base.weight.requires_grad or ops.is_recorded())

    def _untuned_with_backward(self, x: Tensor) -> Tensor:
        """The base layer's output; what a resident forward writes into the weight is in neither pass."""
        base = self.get_base_layer()
        make = partial(self._base_weight, base.weight)
        return ops.linear(x, make, base.bias, [], fan_in_fan_out=self.fan_in_fan_out, guard=self._lock)

    def _tuned_rows(self, name: str, base: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own, deltas = self.get_base_layer().weight, self.active_deltas("weight", [name])
        is_plain = bool(deltas) and not torch.is_grad_enabled() and not ops.is_recorded() and x.device.type == "cpu"
        if is_plain and not self.active_deltas("bias", [name]) and type(own) is nn.Parameter:
            _, overlay = self.overlay("weight", [name])
            with self._parts(own, overlay, [delta.values for delta in deltas]) as parts:
                if parts is not None and takes_parts(x, parts) and base.dtype == x.dtype:
                    return add_parts_(base, x, parts, fan_in_fan_out=self.fan_in_fan_out)
        return super()._tuned_rows(name, base, x, *args, **kwargs)

    def _delta_forward(self, adapters: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight = self.get_base_layer().weight
        bias = self.effective("bias", adapters)
        deltas = self.active_deltas("weight", adapters)
        if not deltas or weight.requires_grad or ops.is_recorded():
            # A trainable base weight (the dense phase under a frozen adapter) needs its own dense gradient; a compiler
            # fuses this itself. Resident mode may have left deltas in the base weight.
            self.restore("weight")
            x = self.measure(x, deltas)
            dense = self.effective("weight", adapters)
            return F.linear(x, dense.t() if self.fan_in_fan_out else dense, bias)
        x = self.measure(x, deltas)
        make_weight, guard, parts = self.weight_maker(adapters)
        return ops.linear(
            x,
            make_weight,
            bias,
            [(d.values, d.indices) for d in deltas],
            fan_in_fan_out=self.fan_in_fan_out,
            observers=[d.observer for d in deltas if d.observer is not None],
            guard=guard,
            parts=parts,
        )

    @staticmethod
    def measure(x: Tensor, deltas: Sequence[AdapterDelta]) -> Tensor:
        """The inputs of a training forward, which the meters of `fitted_rate` have been shown."""
        for delta in deltas:
            if delta.meter is None or not torch.is_grad_enabled() or not delta.values.requires_grad:
                continue
            if is_traced():
                x = shown(x, delta.input_viewer.number)  # type: ignore[union-attr]
            elif not ops.is_recorded():
                delta.meter.see(x)
        return x

    def weight_maker(
        self, adapters: Sequence[str]
    ) -> tuple[Callable[[], Tensor], AbstractContextManager[Any], GetParts | None]:
        """What makes the weight with the adapters' deltas in it, as they are now, for this forward and its backward;
        what is to be held while it is used: in resident mode it is the base weight itself, brought up to date; and in
        transient mode what gives it in its parts (see `ops.linear`).
        """
        base = self.get_base_layer()
        deltas = self.active_deltas("weight", adapters)
        values = [delta.values for delta in deltas]
        # Only what is active is written: a batch that names others would take it out for the threads beside it.
        is_active = list(adapters) == self.active_adapters
        written = self.is_resident and is_active and "weight" not in self.tied_parameters and offload_hook(base) is None
        key, overlay = self.overlay("weight", adapters)
        # `key` has the ids of the deltas: holding them keeps their ids from going to others.
        make = partial(self._make_weight, base.weight, deltas, key, overlay, values, written)
        if written:
            return make, self._lock, None
        return make, nullcontext(), partial(self._parts, base.weight, overlay, values)

    @contextmanager
    def _parts(self, own: Tensor, overlay: Overlay, values: Sequence[Tensor]) -> Iterator[Parts | None]:
        """The weight and the entries that are added to it, while nothing is or can be written into it."""
        with self._lock:
            is_flat = own.is_contiguous() and (not own.is_cpu or overlay.fits(own))
            total = None if "weight" in self._written or not is_flat else overlay.total(values)
            yield None if total is None else Parts(own.detach(), overlay.support, total.contiguous())

    def _make_weight(
        self,
        own: Tensor,
        deltas: Sequence[AdapterDelta],
        key: tuple[Any, ...],
        overlay: Overlay,
        values: Sequence[Tensor],
        written: bool,
    ) -> Tensor:
        with self._lock:
            if written and self.is_resident and not self.merged and own is self.get_base_layer().weight:
                self.write_entries("weight", key, overlay, values)
                return own.data
            return overlay.add(self._base_weight(own), values)

    def _base_weight(self, own: Tensor) -> Tensor:
        """The weight that a forward found, without any delta: in a backward after a merge, or after a block of resident
        mode began, something is written into it.
        """
        with self._lock:
            now = self._written.get("weight")
            return self.pristine("weight") if now is not None and (now.target is own or now.parameter is own) else own

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return not self.fan_in_fan_out


def is_writable(active: ActiveWeights) -> bool:
    """Whether kernels can write what acts into its weight, which is as `ActiveWeights.holds` wants it."""
    return active.weight.dtype in DTYPES and active.overlay.fits(active.weight) and has_own_memory(active.weight)


def _runs(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Name, first place and length of each run of equal names."""
    found, first = [], 0
    for name, run in groupby(names):
        count = len(list(run))
        found.append((name, first, count))
        first += count
    return found

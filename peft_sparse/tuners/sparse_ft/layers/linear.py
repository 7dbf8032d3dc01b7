"""Sparse deltas on linear layers: `nn.Linear` and transformers' `Conv1D`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...._peft_bridge import BaseTunerLayer
from ....core import ops
from ....core.overlay import Overlay
from ....core.parts import GetParts, Parts, add_parts_, takes_parts
from ...common.base_module import has_hooks, offload_hook
from .base import PARAMETERS, SparseLayer
from .delta import AdapterDelta
from .quick import ActiveWeights, Snapshot


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
        if adapter_names is None and not torch.is_grad_enabled():
            active = self._active_weights(x)
            if active is not None:
                with self._lock:
                    if self.num_resident:
                        self._bring_up_to_date(active)
                        return self.base_layer(x, *args, **kwargs)
                    if "weight" not in self._written:
                        result = self._with_few_rows(active, x)
                        if result is not None:
                            return result
        return super().forward(x, *args, adapter_names=adapter_names, **kwargs)

    def _active_weights(self, x: Tensor) -> ActiveWeights | None:
        """The active deltas, if a forward that records nothing needs no more than the base layer and them."""
        if self._disable_adapters or self.merged_adapters or type(x) is not Tensor or not x.is_cpu:
            return None
        base, adapters, active = self._modules["base_layer"], self.active_adapters, self._active
        if has_hooks(base) or "weight" in self.tied_parameters or ops.is_recorded():
            return None
        if active is None or not active.holds(base._parameters.get("weight"), adapters):
            active = self._active = self._find_active(base, adapters)
        return active

    def _find_active(self, base: nn.Module, adapters: list[str]) -> ActiveWeights | None:
        weight, deltas = base._parameters.get("weight"), self.active_deltas("weight", adapters)
        if type(weight) is not nn.Parameter or isinstance(base, BaseTunerLayer):
            return None
        if not deltas or self.active_deltas("bias", adapters):
            return None
        held = [self.deltas_of(part) for part in PARAMETERS]
        watched = [part[name] for part in held for name in adapters if name in part]
        key, overlay = self.overlay("weight", adapters)
        active = ActiveWeights(weight, deltas[0].shape, list(adapters), deltas, key, overlay, watched)
        return active if active.holds(weight, adapters) else None

    def _bring_up_to_date(self, active: ActiveWeights) -> None:
        """Write the active deltas into the base weight, unless just they are there."""
        own, values, written = active.weight, active.values, self._written.get("weight")
        snapshot = written.snapshot if written and written.key == active.key and written.target is own else None
        if snapshot is not None and snapshot.is_current(own, values):
            return
        self.write_entries("weight", active.key, active.overlay, values)
        self._written["weight"].snapshot = Snapshot(own, active.overlay, values)

    def _with_few_rows(self, active: ActiveWeights, x: Tensor) -> Tensor | None:
        """The base layer's output and what the deltas add to it, where that is cheaper than forming the weight."""
        parts = Parts(active.weight, active.overlay.support, active.overlay.total(active.values).contiguous())
        if not takes_parts(x, parts):
            return None
        return add_parts_(self.base_layer(x), x, parts, fan_in_fan_out=self.fan_in_fan_out)

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
            dense = self.effective("weight", adapters)
            return F.linear(x, dense.t() if self.fan_in_fan_out else dense, bias)
        self.measure(x, deltas)
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
    def measure(x: Tensor, deltas: Sequence[AdapterDelta]) -> None:
        """Show the inputs of a training forward to what fits steps to them."""
        for delta in deltas:
            if delta.meter is not None and torch.is_grad_enabled() and delta.values.requires_grad:
                delta.meter.see(x)

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
        written = self.is_resident and "weight" not in self.tied_parameters and offload_hook(base) is None
        key, overlay = self.overlay("weight", adapters)
        # The deltas are part of it so that nothing else gets their identity, by which the key knows them.
        make = partial(self._make_weight, base.weight, deltas, key, overlay, values, written)
        if written:
            return make, self._lock, None
        return make, nullcontext(), partial(self._parts, base.weight, overlay, values)

    @contextmanager
    def _parts(self, own: Tensor, overlay: Overlay, values: Sequence[Tensor]) -> Iterator[Parts | None]:
        """The weight and the entries that are added to it, while nothing is or can be written into it."""
        with self._lock:
            total = None if "weight" in self._written or not own.is_contiguous() else overlay.total(values)
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
            now = self._written.get("weight")
            if now is not None and (now.target is own or now.parameter is own):
                # A backward after a merge, or after a block of resident mode began.
                own = self.pristine("weight")
            return overlay.add(own, values)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return not self.fan_in_fan_out

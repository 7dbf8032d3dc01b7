"""Sparse deltas on linear layers: `nn.Linear` and transformers' `Conv1D`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....core import ops
from ....core.overlay import Overlay
from ...common.base_module import offload_hook
from .base import SparseLayer
from .delta import AdapterDelta


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
        make_weight, guard = self.weight_maker(adapters)
        return ops.linear(
            x,
            make_weight,
            bias,
            [(d.values, d.indices) for d in deltas],
            fan_in_fan_out=self.fan_in_fan_out,
            observers=[d.observer for d in deltas if d.observer is not None],
            guard=guard,
        )

    @staticmethod
    def measure(x: Tensor, deltas: Sequence[AdapterDelta]) -> None:
        """Show the inputs of a training forward to whoever fits steps to them."""
        for delta in deltas:
            if delta.meter is not None and torch.is_grad_enabled() and delta.values.requires_grad:
                delta.meter.see(x)

    def weight_maker(self, adapters: Sequence[str]) -> tuple[Callable[[], Tensor], AbstractContextManager[Any]]:
        """What makes the weight with the adapters' deltas in it, as they are now, for this forward and its backward;
        and what is to be held while it is used: in resident mode it is the base weight itself, brought up to date.
        """
        base = self.get_base_layer()
        deltas = self.active_deltas("weight", adapters)
        values = [delta.values for delta in deltas]
        written = self.is_resident and "weight" not in self.tied_parameters and offload_hook(base) is None
        # The deltas are part of it so that nothing else gets their identity, by which the key knows them.
        make = partial(self._make_weight, base.weight, deltas, *self.overlay("weight", adapters), values, written)
        return make, self._lock if written else nullcontext()

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

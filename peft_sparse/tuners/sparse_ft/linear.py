"""Sparse deltas on linear layers: `nn.Linear` and transformers' `Conv1D`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core import ops
from .layer import SparseLayer


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
        if not deltas or weight.requires_grad or torch.compiler.is_compiling():
            # A trainable base weight (the dense phase under a frozen adapter) needs its own dense gradient; a compiler
            # fuses this itself. Resident mode may have left deltas in the base weight.
            self.restore("weight")
            dense = self.effective("weight", adapters)
            return F.linear(x, dense.t() if self.fan_in_fan_out else dense, bias)
        make_weight = partial(self.make_weight, tuple(adapters))
        return ops.linear(
            x,
            make_weight,
            bias,
            [(d.values, d.indices) for d in deltas],
            fan_in_fan_out=self.fan_in_fan_out,
            observers=[d.observer for d in deltas if d.observer is not None],
        )

    def make_weight(self, adapters: Sequence[str]) -> Tensor:
        """The weight with the adapters' deltas in it: a copy, or in resident mode the base weight itself, brought up to
        date.
        """
        if self.is_resident and "weight" not in self.tied_parameters:
            self.write("weight", adapters)
            return self.get_base_layer().weight.data
        _, overlay = self.overlay("weight", adapters)
        return overlay.add(self.get_base_layer().weight, [d.values for d in self.active_deltas("weight", adapters)])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return not self.fan_in_fan_out

"""Sparse deltas on quantised linear layers: dequantise, add, multiply; nothing dense is kept in between."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...._peft_bridge import QuantizationBackend, quantization_extra_repr
from ....core import ops
from ....core.overlay import Overlay
from ...common.packed import Packed, dequantize, is_transposed
from .base import PARAMETERS
from .in_place import flat
from .linear import Linear


@dataclass(frozen=True)
class MergeError:
    """How far a quantised weight, after a merge, is from what was asked for: W + delta, W the dequantised weight.

    Attributes:
        missed: sum of squares of the difference, over the tuned entries and over the whole weight.
        asked: sum of squares of W + delta, likewise.
        delta: sum of squares of the delta.
    """

    missed: tuple[float, float] = (0.0, 0.0)
    asked: tuple[float, float] = (0.0, 0.0)
    delta: float = 0.0

    def __add__(self, other: MergeError) -> MergeError:
        return MergeError(
            (self.missed[0] + other.missed[0], self.missed[1] + other.missed[1]),
            (self.asked[0] + other.asked[0], self.asked[1] + other.asked[1]),
            self.delta + other.delta,
        )

    @property
    def tuned(self) -> float:
        """Relative root mean square over the tuned entries."""
        return _ratio(self.missed[0], self.asked[0])

    @property
    def whole(self) -> float:
        """Relative root mean square over the weight."""
        return _ratio(self.missed[1], self.asked[1])

    @property
    def of_delta(self) -> float:
        """Root mean square of the miss at the tuned entries, as a multiple of the delta's own."""
        return _ratio(self.missed[0], self.delta)


class QuantizedLinear(Linear):
    """A quantised linear layer with sparse deltas on its weight and bias.

    The weight is dequantised for each product, in the forward and again in the backward; the packed one is never
    written, and resident mode changes nothing. An 8-bit layer is multiplied as its dequantised weight also where
    bitsandbytes would quantise the inputs as well, so a delta of zeros is not quite the base layer's output there.

    Merging quantises the sum again, which loses most of a small delta: `merge_error` says how much. `unmerge` puts the
    packed weight back bit for bit.

    Args:
        base_layer: the layer to tune.
        backend: PEFT's access to its weight.

    Cost: beside the products, the weight is dequantised once in the forward and once in the backward. On a CPU that is
        cheaper than the base layer's product plus a sparse one: 0.20 ms against 0.22 for one row, 1.0 against 1.8 for
        256 rows (nf4 in bfloat16, [1024 x 768] at density 0.01, one core).
    """

    def __init__(self, base_layer: nn.Module, *, backend: QuantizationBackend) -> None:
        super().__init__(base_layer)
        self.fan_in_fan_out = is_transposed(self.get_base_layer())
        self.quantization_backend: QuantizationBackend = backend
        self.merge_error: MergeError | None = None
        self._packed: Packed | None = None

    # ---- forward ---------------------------------------------------------------------------------

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which the base layer multiplies: its own, or that of `x` if it has none."""
        return getattr(self.get_base_layer(), "compute_dtype", None) or x.dtype

    def _delta_forward(self, adapters: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = self.compute_dtype(x)
        bias = self.effective("bias", adapters)
        bias = None if bias is None else bias.to(dtype)
        deltas = self.active_deltas("weight", adapters)
        with _cast_shared(x, dtype):
            given = x if _is_cast_shared(x, dtype) else x.to(dtype)
            given = self.measure(given, deltas)
            if ops.is_recorded():
                weight = self.effective("weight", adapters).to(dtype)  # type: ignore[union-attr]
                result = F.linear(given, weight.t() if self.fan_in_fan_out else weight, bias)
            else:
                result = ops.linear(
                    given,
                    partial(self._make_weight, self._overlay_of(adapters), [d.values for d in deltas], dtype),
                    bias,
                    [(d.values, d.indices) for d in deltas],
                    fan_in_fan_out=self.fan_in_fan_out,
                    observers=[d.observer for d in deltas if d.observer is not None],
                )
        # A base layer with a compute dtype gives back what it was given, also under autocast.
        return result.to(x.dtype) if hasattr(self.get_base_layer(), "compute_dtype") else result

    def _forward_as_before(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = [] if self.disable_adapters else self.active_adapters
        if self.active_deltas("weight", adapters):
            return self._delta_forward(adapters, x, *args, **kwargs)
        return super()._forward_as_before(x, *args, **kwargs)

    def has_own(self, parameter: str) -> bool:
        return parameter != "weight"

    def base_tensor(self, parameter: str) -> Tensor | None:
        if parameter != "weight":
            return super().base_tensor(parameter)
        weight = self.dequantized()
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def dequantized(self) -> Tensor:
        """The base layer's weight without any delta, in the dtype that it was quantised from: a new tensor."""
        module = self.get_base_layer() if self._packed is None else self._packed.stand_in()
        return dequantize(module, self.quantization_backend)

    def make_weight(self, adapters: Sequence[str], *, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantised weight with the adapters' deltas in it: a new tensor in `dtype`, its own if None.

        The sums are made in float32 and rounded once.
        """
        values = [delta.values for delta in self.active_deltas("weight", adapters)]
        return self._make_weight(self._overlay_of(adapters), values, dtype)

    def _overlay_of(self, adapters: Sequence[str]) -> Overlay | None:
        return self.overlay("weight", adapters)[1] if self.active_deltas("weight", adapters) else None

    def _make_weight(self, overlay: Overlay | None, values: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
        weight = self.dequantized()
        result = weight if dtype is None else weight.to(dtype)
        if overlay is not None:
            flat(result)[overlay.indices] = self._entries(weight, overlay, values).to(result.dtype)
        return result

    @staticmethod
    def _entries(weight: Tensor, overlay: Overlay, values: Sequence[Tensor]) -> Tensor:
        originals = flat(weight)[overlay.indices]
        return overlay.entries(originals.to(torch.promote_types(originals.dtype, torch.float32)), values)

    # ---- merging ---------------------------------------------------------------------------------

    def write(self, parameter: str, adapters: Sequence[str]) -> None:
        if parameter != "weight":
            super().write(parameter, adapters)
            return
        self.restore("weight")
        deltas = self.active_deltas("weight", adapters)
        if not deltas:
            return
        _, overlay = self.overlay("weight", adapters)
        weight = self.dequantized()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        before = flat(wide)[overlay.indices]
        asked = self._entries(weight, overlay, [d.values for d in deltas])
        flat(wide)[overlay.indices] = asked
        self._pack(wide.to(weight.dtype))
        missed = dequantize(self.get_base_layer(), self.quantization_backend).to(wide.dtype) - wide
        self.merge_error = MergeError(
            (_squares(flat(missed)[overlay.indices]), _squares(missed)),
            (_squares(asked), _squares(wide)),
            _squares(asked - before),
        )

    def _pack(self, weight: Tensor) -> None:
        """Quantise a weight into the base layer, the packed one put away."""
        owner: Any = self
        while hasattr(owner.base_layer, "base_layer"):
            owner = owner.base_layer
        self._packed = Packed(owner)
        old = owner.base_layer
        self.quantization_backend.set_base_weight(owner, weight.t() if self.fan_in_fan_out else weight)
        if owner.base_layer is not old:
            # PEFT makes a new HQQ layer without a bias.
            owner.base_layer.bias = old.bias
            owner.base_layer.train(old.training)

    def restore(self, parameter: str | None = None) -> None:
        super().restore(parameter)
        if parameter in (None, "weight") and self._packed is not None:
            self._packed.put_back()
            self._packed = None
            self.merge_error = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        before, done = list(self.merged_adapters), False
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            if safe_merge and self.merge_error is not None and not math.isfinite(self.merge_error.missed[1]):
                raise ValueError(
                    f"NaNs detected in the merged weights. With the adapters {self.merged_adapters} the weight leaves "
                    f"the range that {self.quantization_backend.backend_name} can quantise. The layer is unchanged."
                )
            done = True
        finally:
            if not done:
                self.restore()
                self.merged_adapters[:] = before
                for parameter in PARAMETERS:
                    self.write(parameter, before)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def warn_of_loss(layers: Iterable[tuple[str, Linear]], *, way_back: str) -> None:
    """One warning for all layers whose quantised weights deltas were just merged into, with the measured error.

    Args:
        layers: (name, layer) of the whole model.
        way_back: what the user can still do about it.
    """
    errors = {n: e for n, layer in layers if (e := vars(layer).get("merge_error")) is not None}
    if not errors:
        return
    total = sum(errors.values(), MergeError())
    worst = max(errors, key=lambda name: errors[name].tuned)
    warnings.warn(
        f"Merging into quantised weights rounds them again. In {len(errors)} layers the new weights miss what was "
        f"asked for by {total.tuned:.2%} at the tuned entries ({total.of_delta:.0%} of the delta's own size) and by "
        f"{total.whole:.2%} over all entries (relative RMS; worst layer at the tuned entries: {worst}, "
        f"{errors[worst].tuned:.2%}). {way_back}merge_and_unload(dequantize=True) merges without loss.",
        stacklevel=3,
    )


def _is_cast_shared(x: Tensor, dtype: torch.dtype) -> bool:
    return x.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)


def _cast_shared(x: Tensor, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast, where it does just the cast that the base layer does: layers that read the same input (q, k and v) then
    share its copy and its transpose.
    """
    return torch.autocast(x.device.type, dtype=dtype) if _is_cast_shared(x, dtype) else nullcontext()


def _squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64).square())


def _ratio(numerator: float, denominator: float) -> float:
    return (numerator / denominator) ** 0.5 if denominator else 0.0

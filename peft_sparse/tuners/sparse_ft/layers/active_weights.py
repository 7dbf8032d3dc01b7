"""The active deltas of a linear layer for forwards without gradients, looked up once and checked each time.

Generating text calls every layer for every token, on a row or a few, so that asking each of them anew what its active
deltas are would cost as much as its product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....core.backends.native import Kernels, compiled, kernels
from ....core.backends.prepared_calls import BitwiseComparison, SparseProduct
from ....core.few_rows import most_rows
from ....core.ops import is_recorded
from ....core.overlay import Overlay, same_bits
from ...common.base_module import output_of
from .delta import AdapterDelta
from .in_place import DTYPES, Written

# Entries of a weight that are looked at before it is taken to hold what was written.
_NUM_PROBES = 64


class ActiveWeights:
    """The active deltas on a layer's weight, and their union.

    Args:
        weight: the base layer's.
        shape: the deltas'.
        adapters: the active adapters, or the one.
        deltas: those of them that take part.
        key, overlay: see `SparseLayer.overlay`.
        watched: all deltas of the active adapters, also those that hold no weights now.
        fan_in_fan_out: the weight is stored as [in, out].
    """

    # Slots, for they lie together in memory, and nothing of a layer is in a cache any more when its turn comes.
    __slots__ = (
        *("weight", "key", "overlay", "_adapters", "_deltas", "_dtype", "_fan_in_fan_out", "_most_rows"),
        *("_num_entries", "_num_inputs", "_numel", "_probes", "_product", "_watched", "shape"),
    )

    def __init__(
        self,
        weight: nn.Parameter,
        shape: tuple[int, ...],
        adapters: str | Sequence[str],
        deltas: list[AdapterDelta],
        *,
        key: tuple[Any, ...],
        overlay: Overlay,
        watched: Sequence[AdapterDelta],
        fan_in_fan_out: bool,
    ) -> None:
        self.weight, self.key, self.overlay, self._deltas = weight, key, overlay, deltas
        self._adapters = adapters if isinstance(adapters, str) else list(adapters)
        self.shape, self._dtype, self._numel = shape, weight.dtype, weight.numel()
        self._watched = [(delta, delta.support_version) for delta in watched]
        self._fan_in_fan_out = fan_in_fan_out
        self._num_inputs = max(1, shape[0 if fan_in_fan_out else 1])
        self._num_entries = overlay.support.numel()
        self._most_rows = most_rows(self._num_entries, shape, dtype=self._dtype)
        self._probes: Tensor | None = None
        self._product: tuple[Kernels, SparseProduct] | None = None

    def holds(self, weight: Tensor | None, adapters: str | list[str]) -> bool:
        """Whether what was looked up still holds, for this weight and these active adapters."""
        if weight is not self.weight or adapters != self._adapters:
            return False
        for delta, version in self._watched:
            if delta.support_version != version or delta._copied is not None:
                return False
            if type(delta._parameters["values"]) is not nn.Parameter:
                return False
        # The size for safety: the kernels are told addresses.
        is_same = weight.dtype is self._dtype and weight.numel() == self._numel
        return is_same and weight.is_cpu and weight.is_contiguous()

    def is_written_in(self, written: Mapping[str, Written]) -> bool:
        """Whether just the active deltas are in the weight, given what is written into the layer's parameters."""
        own = written.get("weight")
        snapshot = None if own is None else own.snapshot
        return snapshot is not None and snapshot.active is self and snapshot.is_current(self.values)

    @property
    def probes(self) -> Tensor:
        """[n] int64 positions in the weight, spread over the union of the supports."""
        if self._probes is None:
            support = self.overlay.support
            self._probes = support[:: max(1, support.numel() // _NUM_PROBES)].long()
        return self._probes

    @property
    def values(self) -> list[Tensor]:
        """The values of each delta, as they are now."""
        return [delta._parameters["values"] for delta in self._deltas]  # type: ignore[misc]

    def with_few_rows(self, base: nn.Module, x: Tensor) -> Tensor | None:
        """A linear layer's output and what the deltas add to it, where that is cheaper than forming the weight.

        Args:
            base: the layer, without hooks; its weight is `weight`, which is as `holds` wants it and holds no delta.
            x: [..., in], a plain tensor.
        """
        num_rows = x.numel() // self._num_inputs
        ready = self.product_with(x, num_rows)
        if ready is None:
            return None
        y = output_of(base, x).contiguous()
        product, values = ready
        product.add_(y, x if x.is_contiguous() else x.contiguous(), num_rows, self.weight, values)
        return y

    def product_with(self, x: Tensor, num_rows: int) -> tuple[SparseProduct, Tensor] | None:
        """What adds the deltas' part to the base layer's output, and [u] its values, for so many rows of inputs like
        `x`; None where forming the weight is cheaper, or kernels cannot do it.
        """
        if not 0 < num_rows <= self._most_rows or x.dtype is not self._dtype or not x.is_cpu:
            return None
        if torch._C._is_any_autocast_enabled() or is_recorded():
            return None
        product, values = self._by_kernels(x), self.total()
        return None if product is None or values is None else (product, values)

    def _by_kernels(self, x: Tensor) -> SparseProduct | None:
        native = compiled()
        if native is None or torch._C._len_torch_dispatch_stack():
            return None
        if self._product is None or self._product[0] is not native:
            if kernels(x, dtypes=DTYPES) is None:
                return None
            product = SparseProduct(
                native,
                self.overlay.support,
                dtype=self._dtype,
                shape=self.shape,
                row_is_output=not self._fan_in_fan_out,
            )
            self._product = native, product
        return self._product[1]

    def total(self) -> Tensor | None:
        """[u] float32, the sum of the deltas at the union of their supports; None if it is none."""
        values = self.values
        total = values[0] if len(values) == 1 and values[0].dtype is torch.float32 else self.overlay.total(values)
        if total.dtype is not torch.float32 or total.numel() != self._num_entries or not total.is_cpu:
            return None
        return total if total.is_contiguous() else total.contiguous()


class Snapshot:
    """What was written into a weight, to tell whether it is up to date.

    Contents are compared and not versions, for what is written by `.data` leaves no version behind: of the values all,
    of the weight some entries, spread over the support. (Code that writes into a weight while deltas are in it
    replaces all of it, or asks for what cannot last: leaving restores what was there before.)

    Args:
        active: whose deltas were just written into its weight.
        values: of each delta.

    Attributes:
        active: the same.
    """

    __slots__ = ("_entries", "_held", "_places", "active")

    def __init__(self, active: ActiveWeights, values: Sequence[Tensor]) -> None:
        self.active = active
        self._places = active.probes
        self._entries = active.weight.data.view(-1)[self._places]
        copies = [value.detach().clone(memory_format=torch.contiguous_format) for value in values]
        native = kernels(active.weight, *values)
        comparisons = [
            None if native is None else BitwiseComparison(native, copy, self._places, self._entries) for copy in copies
        ]
        self._held = [(c, c.dtype, c.numel(), comparison) for c, comparison in zip(copies, comparisons, strict=True)]

    def is_current(self, values: Sequence[Tensor]) -> bool:
        """Whether the weight, which is as `ActiveWeights.holds` wants it, holds these values already."""
        weight = self.active.weight
        for value, (copy, dtype, count, comparison) in zip(values, self._held):  # noqa: B905 -- of one length, and hot
            if value.dtype is not dtype or value.numel() != count:
                return False
            if comparison is not None and value.is_cpu and value.is_contiguous():
                is_same = comparison.is_same(value, weight)
            else:
                is_same = value.shape == copy.shape and value.device == copy.device and same_bits(value.detach(), copy)
                is_same = is_same and same_bits(weight.detach().view(-1)[self._places], self._entries)
            if not is_same:
                return False
        return True

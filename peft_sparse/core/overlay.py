"""Writing several deltas into one weight at once: the union of their supports and the one rounding rule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from .backends.entries import add_entries_
from .backends.native import kernels
from .indices import positions, union

# What the kernels can move, whatever it stands for.
_MOVED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Overlay:
    """The union of the supports of one or more deltas on one weight.

    Every path that forms `W + delta` (forward, merge, resident mode) takes its numbers from `entries`, so that all of
    them agree bit for bit.

    Args:
        supports: the deltas' indices, each [k_i] sorted and unique, in the order in which their values will be given.
    """

    def __init__(self, supports: Sequence[Tensor]) -> None:
        self._union = union(supports).contiguous()
        self._end: int | None = None
        self._slots = None if len(supports) == 1 else [positions(self._union, s)[0] for s in supports]

    def fits(self, weight: Tensor) -> bool:
        """Whether all places lie in a weight on the CPU: kernels are told addresses, and do not look."""
        if self._end is None:
            self._end = int(self._union[-1]) + 1 if self._union.numel() else 0
        return weight.numel() >= self._end

    @property
    def indices(self) -> Tensor:
        """[u] int64, as torch's indexing wants them; made on demand, the union itself is kept in its narrow dtype."""
        return self._union.long()

    def entries(self, originals: Tensor, values: Sequence[Tensor]) -> Tensor:
        """What is at `indices` once all deltas are added: [u], in the dtype of `originals`.

        Args:
            originals: [u] the weight's own entries at `indices`.
            values: one [k_i] tensor per support, in the order given to the constructor.

        The deltas are summed first and added to the original then, in float32 (float64 if any of them is), and rounded
        once.
        """
        dtype = reduce(
            torch.promote_types, [v.dtype for v in values], torch.promote_types(originals.dtype, torch.float32)
        )
        total = self._total(values, dtype)
        return (originals.to(dtype) + total).to(originals.dtype)

    def add(self, weight: Tensor, values: Sequence[Tensor]) -> Tensor:
        """A copy of `weight` with the deltas in it; `weight` itself is left alone and no gradient is recorded."""
        weight = weight.detach()
        result = weight.clone(memory_format=torch.contiguous_format)
        flat = result.view(-1)
        if self._slots is None and values[0].dtype == flat.dtype and flat.dtype in (torch.float32, torch.float64):
            # The common case in one pass; nothing is rounded twice here, so the numbers are those of `entries`.
            return flat.index_add_(0, self._union, values[0].detach()).view(result.shape)
        self.write_(flat, values)
        return result

    def write_(self, flat: Tensor, values: Sequence[Tensor], *, originals: Tensor | None = None) -> None:
        """Write `entries` into a weight's memory; with `originals`, only where there is something else.

        Args:
            flat: [numel] contiguous, written in place; no gradient is recorded.
            values: one [k_i] tensor per support.
            originals: [u] the weight's own entries; what is in `flat` if None.

        Cost: with `originals`, on a CPU, a look at every entry, and nothing more if all of them are up to date. What
            is there is compared, not a version, for writing by `.data` leaves no version behind. Elsewhere looking
            would mean waiting for the device, so all of them are written.
        """
        if originals is not None and flat.device.type == "cpu":
            self._write_changed(flat, values, originals)
        elif self._slots is None:
            add_entries_(flat, self._union, values[0], originals)
        else:
            indices = self.indices
            flat[indices] = self.entries(flat[indices] if originals is None else originals, values)

    def _write_changed(self, flat: Tensor, values: Sequence[Tensor], originals: Tensor) -> None:
        if self._slots is None:
            value = values[0].detach()
            native = kernels(flat, originals, dtypes=(torch.float32, torch.bfloat16))
            fits = value.shape == originals.shape == self._union.shape and originals.is_contiguous()
            if (
                native is not None
                and fits
                and self.fits(flat)
                and flat.dtype == originals.dtype
                and value.dtype == torch.float32
            ):
                native.bring_up_to_date_(flat, self._union, originals, value.contiguous())
                return
        indices, wanted = self.indices, self.entries(originals.to(flat.device, flat.dtype), values)
        if not same_bits(flat[indices], wanted):
            flat[indices] = wanted

    def take(self, flat: Tensor) -> Tensor:
        """[u] what is at `indices` in a weight's memory."""
        native = kernels(flat, dtypes=_MOVED)
        return flat[self.indices] if native is None or not self.fits(flat) else native.take(flat, self._union)

    def put_(self, flat: Tensor, entries: Tensor) -> None:
        """Write [u] entries of the same dtype and device at `indices` into a weight's memory."""
        native = kernels(flat, entries, dtypes=_MOVED)
        is_plain = flat.dtype == entries.dtype and entries.is_contiguous() and entries.shape == self._union.shape
        if native is None or not is_plain or not self.fits(flat):
            flat[self.indices] = entries
        else:
            native.put_(flat, self._union, entries)

    def total(self, values: Sequence[Tensor]) -> Tensor:
        """[u] float32 (float64 if any are), the sum of the deltas at the union of their supports."""
        if self._slots is None and values[0].dtype is torch.float32:
            return values[0].detach()
        return self._total(values, reduce(torch.promote_types, [v.dtype for v in values], torch.float32))

    def _total(self, values: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        if self._slots is None:
            return values[0].detach().to(dtype)
        total = torch.zeros(self._union.numel(), dtype=dtype, device=self._union.device)
        for slots, value in zip(self._slots, values, strict=True):
            total.index_add_(0, slots, value.detach().to(dtype))
        return total

    @property
    def support(self) -> Tensor:
        """[u] the union of the supports, in its narrow dtype."""
        return self._union


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one floating dtype are equal bit for bit; a NaN equals itself."""
    image = {8: torch.int64, 4: torch.int32, 2: torch.int16}[left.element_size()]
    return torch.equal(left.view(image), right.view(image))


def add_deltas(parameter: Tensor, deltas: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`parameter` with deltas added, differentiable in the parameter and in the values; same numbers as `Overlay`, at
    dense cost.

    Args:
        parameter: any shape.
        deltas: (values [k], indices [k]) pairs.
    """
    dtype = reduce(
        torch.promote_types, [v.dtype for v, _ in deltas], torch.promote_types(parameter.dtype, torch.float32)
    )
    total = torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
    for values, indices in deltas:
        total = total.index_add(0, indices, values.to(dtype))
    return (parameter.to(dtype) + total.view(parameter.shape)).to(parameter.dtype)

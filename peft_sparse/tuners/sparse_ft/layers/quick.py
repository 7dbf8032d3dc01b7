"""What a linear layer needs to know in a forward that records nothing, looked up once and checked each time.

Generating text calls every layer for every token, on a row or a few, so that asking each of them anew what its active
deltas are would cost as much as its product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ....core.backends.native import kernels
from ....core.overlay import Overlay, same_bits
from .delta import AdapterDelta

# Entries of a weight that are looked at before it is taken to hold what was written.
_NUM_PROBES = 64


@dataclass(eq=False)
class ActiveWeights:
    """The active deltas on a layer's weight, and their union.

    Attributes:
        weight: the base layer's.
        shape: the deltas'.
        adapters: the active adapters.
        deltas: those of them that take part.
        key, overlay: see `SparseLayer.overlay`.
        watched: all deltas of the active adapters, also those that hold no weights now.
    """

    weight: nn.Parameter
    shape: tuple[int, ...]
    adapters: list[str]
    deltas: list[AdapterDelta]
    key: tuple[Any, ...]
    overlay: Overlay
    watched: list[AdapterDelta]
    _versions: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._versions = [delta.support_version for delta in self.watched]

    def holds(self, weight: Tensor | None, adapters: list[str]) -> bool:
        """Whether all of it is still so, for this weight and these active adapters."""
        if weight is not self.weight or adapters != self.adapters:
            return False
        if weight.shape != self.shape or not (weight.is_cpu and weight.is_contiguous()):
            return False
        for delta, version in zip(self.watched, self._versions):  # noqa: B905 -- of one length, and hot
            if delta.support_version != version or delta._copied is not None:
                return False
        return True

    @property
    def values(self) -> list[Tensor]:
        """The values of each delta, as they are now."""
        return [delta._parameters["values"] for delta in self.deltas]  # type: ignore[misc]


class Snapshot:
    """What was written into a weight, to tell whether it is up to date.

    Contents are compared and not versions, for what is written by `.data` leaves no version behind: of the values all,
    of the weight some entries, spread over the support. (Code that writes into a weight while deltas are in it
    replaces all of it, or asks for what cannot last: leaving restores what was there before.)

    Args:
        weight: the parameter, just written into.
        overlay: where.
        values: of each delta.
    """

    def __init__(self, weight: nn.Parameter, overlay: Overlay, values: Sequence[Tensor]) -> None:
        support = overlay.support
        step = max(1, support.numel() // _NUM_PROBES)
        self._places = support[::step].long()
        self._entries = weight.data.view(-1)[self._places]
        self._values = [value.detach().clone() for value in values]
        self._native = kernels(weight, *values)

    def is_current(self, weight: nn.Parameter, values: Sequence[Tensor]) -> bool:
        """Whether a weight holds these values already."""
        if weight.dtype is not self._entries.dtype:
            return False
        for value, before in zip(values, self._values, strict=True):
            if value.dtype is not before.dtype or value.shape != before.shape or value.device != before.device:
                return False
            if self._native is not None and value.is_contiguous():
                if not self._native.are_unchanged(value, before, weight, self._places, self._entries):
                    return False
            elif not (
                same_bits(value.detach(), before) and same_bits(weight.detach().view(-1)[self._places], self._entries)
            ):
                return False
        return True

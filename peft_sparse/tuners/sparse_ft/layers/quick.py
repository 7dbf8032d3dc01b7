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
        adapters: the active adapters.
        deltas: those of them that take part.
        key, overlay: see `SparseLayer.overlay`.
        watched: all deltas of the active adapters, also those that hold no weights now.
    """

    adapters: list[str]
    deltas: list[AdapterDelta]
    key: tuple[Any, ...]
    overlay: Overlay
    watched: list[AdapterDelta]
    _versions: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._versions = [delta.support_version for delta in self.watched]

    def holds(self, adapters: list[str]) -> bool:
        """Whether all of it is still so, for these active adapters."""
        if adapters != self.adapters:
            return False
        for delta, version in zip(self.watched, self._versions, strict=True):
            if delta.support_version != version or delta._copied is not None:
                return False
        return True

    @property
    def values(self) -> list[Tensor]:
        """The values of each delta, as they are now."""
        return [delta.values for delta in self.deltas]


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
        flat = weight.data.view(-1)
        self._entries = flat[self._places]
        self._values = [value.detach().clone() for value in values]

    def is_current(self, weight: nn.Parameter, values: Sequence[Tensor]) -> bool:
        """Whether a weight holds these values already."""
        flat = weight.detach()
        for value, before in zip(values, self._values, strict=True):
            if value.shape != before.shape or (value.dtype, value.device) != (before.dtype, before.device):
                return False
            native = kernels(value, weight) if value.is_contiguous() else None
            if native is not None:
                if not native.are_unchanged(value, before, flat, self._places, self._entries):
                    return False
            elif not (same_bits(value.detach(), before) and same_bits(flat.view(-1)[self._places], self._entries)):
                return False
        return True

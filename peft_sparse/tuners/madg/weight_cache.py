"""A cache of the weights that a site generated last, for evaluation without gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bottleneck.adapter import BottleneckWeights

# Entries of a tensor that are looked at, at least, before it is taken to be what it was.
_NUM_PROBES = 8


class _Kept(NamedTuple):
    key: tuple[Any, ...]
    sources: list[weakref.ref[Tensor]]
    weights: BottleneckWeights


class WeightCache:
    """Keeps what one site generated for one language, until anything that it was generated from changes.

    Changes are told by the tensors' identity, storage, dtype and version, and on a CPU by a few of their entries, for
    `parameter.data.copy_(average)` leaves no version behind. What is not seen is such an operation that spares these
    entries, and any in-place operation on `parameter.data` elsewhere, where looking would mean waiting for the device.
    Copies and pickles start empty.

    Cost: the weights of one adapter, 2hm numbers, where a forward reads 2hm(d_l + d_b) to generate them.
    """

    def __init__(self) -> None:
        # One object, put in its place in one step: several threads may compute with this site.
        self._kept: _Kept | None = None

    def get(
        self, language: str, sources: Sequence[Tensor], generate: Callable[[], BottleneckWeights]
    ) -> BottleneckWeights:
        """The weights for a language: those that are kept, or else new ones.

        Args:
            language: its code.
            sources: the tensors that they are generated from.
            generate: makes them.
        """
        if any(tensor.is_inference() for tensor in sources):
            # They count no versions.
            return generate()
        kind = sources[0].device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (language, autocast, *((t._version, t.data_ptr(), t.dtype, _some_entries(t)) for t in sources))
        kept = self._kept
        if kept is None or kept.key != key or not all(k() is s for k, s in zip(kept.sources, sources, strict=True)):
            self._kept = None
            kept = self._kept = _Kept(key, [weakref.ref(tensor) for tensor in sources], generate())
        return kept.weights

    def drop(self) -> None:
        """Keep nothing."""
        self._kept = None

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()


def _some_entries(tensor: Tensor) -> tuple[float, ...]:
    """A few numbers of a tensor on a CPU, spread over it."""
    if not tensor.is_cpu or not tensor.is_contiguous():
        return ()
    flat = tensor.detach().view(-1)
    return tuple(flat[:: max(1, flat.numel() // _NUM_PROBES)].tolist())

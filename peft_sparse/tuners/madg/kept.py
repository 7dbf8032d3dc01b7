"""The weights that were generated last, for forwards that only compute."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bottleneck.adapter import BottleneckWeights


class KeptWeights:
    """Keeps what one site generated for one language, until anything that it was generated from changes.

    Changes are told by the tensors' identity, storage, dtype and version: whatever writes into them is seen but for
    in-place operations on `parameter.data`. Copies and pickles start empty.

    Cost: the weights of one adapter, 2hm numbers, where a forward reads 2hm(d_l + d_b) to generate them.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._sources: list[weakref.ref[Tensor]] = []
        self._weights: BottleneckWeights | None = None

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
        key = (language, autocast, *((t._version, t.data_ptr(), t.dtype) for t in sources))
        same = self._key == key and all(kept() is own for kept, own in zip(self._sources, sources, strict=True))
        if self._weights is None or not same:
            self.drop()
            self._weights, self._key = generate(), key
            self._sources = [weakref.ref(tensor) for tensor in sources]
        return self._weights

    def drop(self) -> None:
        """Keep nothing."""
        self._key, self._sources, self._weights = None, [], None

    def __reduce__(self) -> tuple[type[KeptWeights], tuple[()]]:
        return KeptWeights, ()

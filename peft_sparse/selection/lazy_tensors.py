"""Tensors that are computed when they are asked for, so that one tensor of a model at a time is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are computed when they are asked for, and not kept.

    Args:
        names: in their order.
        compute: name -> tensor.
    """

    def __init__(self, names: Sequence[str], compute: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

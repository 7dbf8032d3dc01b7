"""Supports that change in the middle of a run without a reselection: by loading an earlier state of the adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor
from torch.optim import Optimizer

from ...optim.reindex import reindex, state_holders
from ...selection.replacement import replacement_between
from ...tuners.sparse_ft.layers.delta import AdapterDelta


class ChangedSupports:
    """Carries the state of optimizers over when an adapter's support has changed by other means than a reselection.

    A trainer loads its best checkpoint and trains on; a loop goes back to an earlier state by hand. The moments that
    the optimizer holds belong to the weights of the old support, entry by entry. An optimizer whose own state was
    loaded meanwhile is left alone: that state belongs to the same checkpoint.

    Args:
        deltas: {parameter name: delta}.
    """

    def __init__(self, deltas: Mapping[str, AdapterDelta]) -> None:
        self._deltas = deltas
        # {optimizer: a tensor of its state as the last update left it}
        self._left: WeakKeyDictionary[Optimizer, ReferenceType[Tensor]] = WeakKeyDictionary()
        # {parameter name: the version of its support, and that}; of none before the first step, which knows no moments.
        self._known: dict[str, tuple[int, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_left"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._left = WeakKeyDictionary()

    def note(self) -> None:
        """Take the supports as they are now for those that optimizers know."""
        self._known = {name: (delta.support_version, delta.indices) for name, delta in self._deltas.items()}

    def after_update(self, optimizers: Iterable[Optimizer]) -> None:
        """An update was made, by these optimizers."""
        for optimizer in optimizers:
            if (tensor := self._a_tensor_of(optimizer)) is not None:
                self._left[optimizer] = ref(tensor)

    def before_step(self, optimizers_of: Callable[[Tensor], list[Optimizer]]) -> None:
        """A step begins: carry the state of whatever has another support now.

        Args:
            optimizers_of: gives the optimizers that have stepped on some values.
        """
        if not self._known:
            self.note()
        changed = [name for name, delta in self._deltas.items() if delta.support_version != self._known[name][0]]
        for name in changed:
            delta, (_, old) = self._deltas[name], self._known[name]
            held = delta.held_values
            if self._left:
                replacement = replacement_between(old.to(delta.indices.device), delta.indices)
                kept = [optimizer for optimizer in optimizers_of(held) if self._is_as_left(optimizer)]
                for optimizer in state_holders(kept, held) if kept else ():
                    reindex(optimizer, held, replacement)
        if changed:
            self.note()

    def _is_as_left(self, optimizer: Optimizer) -> bool:
        left = self._left.get(optimizer)
        return left is not None and left() is not None and left() is self._a_tensor_of(optimizer)

    def _a_tensor_of(self, optimizer: Optimizer) -> Tensor | None:
        for delta in self._deltas.values():
            state = optimizer.state.get(delta.held_values, {})
            for value in state.values():
                if isinstance(value, Tensor) and value.dim():
                    return value
        return None

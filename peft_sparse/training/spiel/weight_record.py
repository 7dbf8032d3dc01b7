"""When each tuned weight of an adapter was grown, and what it was after the last reselection."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...selection.replacement import Replacement
from ...tuners.sparse_ft.layers.delta import AdapterDelta


class WeightRecord:
    """Follows the weights of an adapter through its reselections.

    Args:
        deltas: {parameter name: delta}.
        keeps_values: whether values after a reselection are wanted at the next one.
    """

    def __init__(self, deltas: Mapping[str, AdapterDelta], *, keeps_values: bool) -> None:
        self._deltas, self._keeps_values = deltas, keeps_values
        self._grown_at = {name: torch.zeros(delta.count, dtype=torch.int32) for name, delta in deltas.items()}
        self._values: dict[str, Tensor] = {}

    def grown_at(self, name: str) -> Tensor:
        """[k] int32, the update after which each weight of a tensor was last grown; 0 for those of the first support.

        It begins anew if a load gave the tensor another number of weights.
        """
        count = self._deltas[name].count
        if self._grown_at[name].numel() != count:
            self._grown_at[name] = torch.zeros(count, dtype=torch.int32)
        return self._grown_at[name]

    def last_values(self, name: str) -> Tensor | None:
        """[k] the values after the last reselection, if they are kept and there was one."""
        return self._values.get(name)

    def mean_age(self, update: int) -> float:
        """Updates since a weight was last grown, mean over all weights."""
        total = sum(grown.numel() for grown in self._grown_at.values())
        return sum(float((update - grown).sum()) for grown in self._grown_at.values()) / total

    def replace(self, name: str, replacement: Replacement, values: Tensor, *, update: int) -> None:
        """Take a replacement into account, before the tensor has its new support.

        Args:
            name: of the tensor.
            replacement: what is dropped and grown.
            values: [k] the values afterwards.
            update: after which it happens.
        """
        self._grown_at[name] = replacement.carry(self.grown_at(name), update)
        if self._keeps_values:
            self._values[name] = values.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all that is known, by names that `load_state_dict` knows."""
        state = {f"grown_at.{name}": self.grown_at(name).clone() for name in self._deltas}
        return state | {f"last_values.{name}": values.clone() for name, values in self._values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken; other names are passed over."""
        self._values = {}
        for name, delta in self._deltas.items():
            self._grown_at[name] = state[f"grown_at.{name}"].clone()
            if f"last_values.{name}" in state:
                self._values[name] = state[f"last_values.{name}"].to(delta.values.device, copy=True)

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
        # Made when they are asked for: most adapters that are loaded never train.
        self._grown_at: dict[str, Tensor] = {}
        self._values: dict[str, Tensor] = {}
        # Of the supports that this is about.
        self._versions = {name: delta.support_version for name, delta in deltas.items()}

    def grown_at(self, name: str) -> Tensor:
        """[k] int32, the update after which each weight of a tensor was last grown; 0 for those of the first support.

        It begins anew if a load gave the tensor other weights. Before 0 are those of an earlier run.
        """
        self._look(name)
        return self._grown_at[name]

    def begin_run(self, update: int) -> None:
        """Another run begins, after so many updates: they are counted from 0 again."""
        for name in self._deltas:
            self._grown_at[name] = self.grown_at(name) - update

    def last_values(self, name: str) -> Tensor | None:
        """[k] the values after the last reselection, if they are kept and there was one, and no load since."""
        self._look(name)
        return self._values.get(name)

    def mean_age(self, update: int) -> float:
        """Updates since a weight was last grown, mean over all weights."""
        grown = [self.grown_at(name) for name in self._deltas]
        return sum(float((update - one).sum()) for one in grown) / sum(one.numel() for one in grown)

    def _look(self, name: str) -> None:
        delta = self._deltas[name]
        known = self._grown_at.get(name)
        if known is None or known.numel() != delta.count or self._versions[name] != delta.support_version:
            self._grown_at[name] = torch.zeros(delta.count, dtype=torch.int32)
            self._values.pop(name, None)
            self._versions[name] = delta.support_version

    def replaced(self, name: str) -> None:
        """The tensor has the support now that `replace` told of."""
        self._versions[name] = self._deltas[name].support_version

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
            self._versions[name] = delta.support_version
            self._grown_at[name] = state[f"grown_at.{name}"].clone()
            if f"last_values.{name}" in state:
                self._values[name] = state[f"last_values.{name}"].to(delta.values.device, copy=True)

"""An optimizer as a plan takes it: its states are made and its step is taken on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from ..errors import ConfigError
from ..optim.sm3 import SM3
from ..optim.sparse_adamw import SparseAdamW
from ..tuners.sparse_ft.layers.delta import AdapterDelta

OPTIMIZERS = ("adamw", "adamw_8bit", "sparse_adamw", "sm3", "sgd")
# bitsandbytes: weights that share a scale in its 8-bit AdamW, and the smallest tensor whose state that quantises.
_STATE_BLOCK, _SMALLEST_STATE = 256, 4096


class PlannedOptimizer:
    """An optimizer of some name for tensors without data.

    Attributes:
        name: one of `OPTIMIZERS`.
        has_ages: whether weights come to have ages of their own, as they do when some are grown.
    """

    def __init__(self, name: str, parameters: Sequence[nn.Parameter], deltas: Sequence[AdapterDelta] = ()) -> None:
        if name not in OPTIMIZERS:
            raise ConfigError(f"optimizer must be one of {list(OPTIMIZERS)}, got {name!r}.")
        self.name = name
        self.has_ages = False
        self._parameters = list(parameters)
        self._values = {id(delta.values) for delta in deltas}  # heads grow no weights
        makers: dict[str, Callable[[], Optimizer]] = {
            "adamw": lambda: AdamW(self._parameters, foreach=False),
            "sparse_adamw": lambda: SparseAdamW(self._parameters),
            "sm3": lambda: SM3(self._parameters, lr=1.0, deltas=deltas),
        }
        self._optimizer = makers[name]() if name in makers else SGD(self._parameters, lr=1.0)

    @property
    def takes_memory(self) -> bool:
        """Whether a step needs memory; torch's AdamW is taken as fused, transformers' default, which needs none."""
        return self.name in ("sparse_adamw", "sm3")

    def first_step(self) -> None:
        """Make the states."""
        self.step()
        for parameter, state in self._optimizer.state.items():
            if self.has_ages and "age" in state and id(parameter) in self._values:
                state["age"] = torch.zeros_like(parameter, dtype=torch.int32)

    def step(self) -> None:
        """An update."""
        self._optimizer.step()

    def booked_bytes(self) -> int:
        """Bytes of the states that the dry run made."""
        return sum(
            tensor.nbytes
            for state in self._optimizer.state.values()
            for tensor in state.values()
            if isinstance(tensor, Tensor) and tensor.is_meta
        )

    def state_bytes(self) -> int:
        """Bytes of the states that a real run makes."""
        if self.name != "adamw_8bit":
            return self.booked_bytes()
        sizes = [p.numel() for p in self._parameters]
        return sum(2 * (n + 4 * ceil(n / _STATE_BLOCK)) if n >= _SMALLEST_STATE else 8 * n for n in sizes)

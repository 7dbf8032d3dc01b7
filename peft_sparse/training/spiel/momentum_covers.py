"""SpIEL-MA's estimate of gradients: what SM3's accumulators say about the weights that are not tuned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ...core.sharded import is_sharded, whole
from ...optim.reindex import GrownGradients
from ...optim.sm3 import SM3, accumulate_all
from ...selection.momentum import grow_candidates, momentum_estimate
from ...selection.replacement import Candidates
from ...tuners.sparse_ft.layers.delta import AdapterDelta
from .gradient_tap import not_finite


class MomentumCovers:
    """Row and column accumulators of every tuned matrix: those of SM3, or kept on the side under other optimizers.

    Vectors (biases, norms) have no rows and columns to guess from; their supports stay as they are.

    Args:
        deltas: {parameter name: delta}.
    """

    def __init__(self, deltas: Mapping[str, AdapterDelta]) -> None:
        self._deltas = {name: delta for name, delta in deltas.items() if len(delta.shape) >= 2}
        self._covers: dict[str, tuple[Tensor, Tensor]] = {}
        # {parameter name: how many updates are in its accumulators}
        self._updates: dict[str, int] = {}

    def after_step(self, optimizer: Optimizer, names: Iterable[str]) -> None:
        """Take one update's gradients into account.

        Args:
            optimizer: which made it.
            names: of the tensors that it updated.

        Raises:
            SelectionError: a gradient is not finite.
        """
        updates = []
        for name in names:
            delta = self._deltas.get(name)
            if delta is None:
                continue
            self._updates[name] = self._updates.get(name, 0) + 1
            held = delta.held_values
            gradient = held.grad
            gathered = whole(gradient)
            if is_sharded(gradient) and not bool(torch.isfinite(gathered).all()):
                raise not_finite(name, "an update")
            if isinstance(optimizer, SM3):
                self._covers[name] = optimizer.row_accumulator(held), optimizer.column_accumulator(held)
                continue
            if name not in self._covers:
                rows, columns = delta.shape[0], delta.numel // delta.shape[0]
                zeros = torch.zeros(rows + columns, dtype=torch.float32, device=delta.indices.device)
                self._covers[name] = zeros[:rows], zeros[rows:].clone()
            gathered = gathered.to(delta.indices.device, torch.float32)
            updates.append((gathered, *self._covers[name], delta.indices))
        accumulate_all(updates)

    def candidates(self, wanted: Mapping[str, int]) -> dict[str, Candidates]:
        """The untuned weights with the largest estimates.

        Args:
            wanted: {parameter name: how many}.
        """
        return {
            name: grow_candidates(row, column, self._deltas[name].indices, wanted[name])
            for name, (row, column) in self._covers.items()
        }

    def grown_gradients(self, name: str, grown: Tensor) -> GrownGradients:
        """What the moments of grown weights start from under optimizers that count their steps together.

        Such an optimizer takes a moment of zero for one of many small gradients, and divides the next steps by it: with
        Adam after t updates a grown weight's first step would be (1 - beta1) / sqrt(1 - beta2) = 3.2 times the
        learning rate, and the next ones up to 6.5 times. Its second moment therefore starts from the mean square that
        the accumulators estimate. The first moment starts at zero, for they know no sign, so its steps grow within the
        first 1 / (1 - beta1) updates. Where each weight has its age (`SparseAdamW`), that is 0 and both start at zero,
        as for a new parameter.

        Args:
            name: of the tensor.
            grown: [n] flat positions of the grown weights, ascending.
        """
        row, column = self._covers[name]
        mean_square = momentum_estimate(row, column, grown).square().float() / max(1, self._updates.get(name, 1))
        return GrownGradients(torch.zeros_like(mean_square), mean_square, 0)

    def state_dict(self) -> dict[str, Tensor]:
        """The accumulators, by parameter name, and over how many updates they are."""
        counts = {f"updates.{name}": torch.tensor(count) for name, count in self._updates.items()}
        return counts | {
            f"{part}.{name}": c.clone()
            for name, pair in self._covers.items()
            for part, c in zip("rc", pair, strict=True)
        }

    def load_state_dict(self, state: Mapping[str, Tensor], *, updates: int) -> None:
        """Go on where `state_dict` was taken.

        Args:
            state: what it gave.
            updates: of the run so far, for states of older versions, which do not say over how many they are.
        """
        self._covers, self._updates = {}, {}
        for name, delta in self._deltas.items():
            if f"r.{name}" in state:
                row, column = (state[f"{part}.{name}"].to(delta.indices.device, copy=True) for part in "rc")
                self._covers[name] = row, column
                self._updates[name] = int(state.get(f"updates.{name}", updates))

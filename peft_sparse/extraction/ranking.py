"""One pass over the differences of a source: how large they are, and which weights are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..core.delta import SparseDelta
from ..core.indices import index_dtype
from ..errors import SelectionError
from ..selection.budget import Group
from ..selection.top_k import streamed_top_k
from .result import Kept
from .sources import Source

# A difference and its parameter's name -> scores of the same shape. It may not write into the difference.
Scores = Callable[[Tensor, str], Tensor]


@dataclass(frozen=True)
class Measured:
    """How many weights of a parameter differ, and the sum of their squared differences."""

    differing: int
    squared: float


def measure(difference: Tensor) -> Measured:
    """Measure a difference; the sum is taken in float64."""
    norm = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
    return Measured(int(difference.count_nonzero()), norm * norm)


class Ranking:
    """Selects weights of a source's parameters, and measures all of them on the way.

    Args:
        source: where the differences come from.
        names: the targeted parameters, in the order of the model.
        advance: called once for each tensor read.

    Attributes:
        selected: {parameter: indices of the weights that are kept}, once something was taken.
        measured: {parameter: what its difference is like}.
    """

    def __init__(self, source: Source, names: Sequence[str], *, advance: Callable[[], None]) -> None:
        self.source, self.names = source, list(names)
        self.shapes = {name: tuple(source.skeleton.shapes[name]) for name in names}
        self.sizes = {name: prod(shape) for name, shape in self.shapes.items()}
        self.selected: dict[str, Tensor] = {}
        self.measured: dict[str, Measured] = {}
        self._advance = advance

    def _difference(self, name: str) -> Tensor:
        difference = self.source.difference(name)
        self.measured[name] = measure(difference)
        self._advance()
        return difference

    def take_all(self) -> None:
        """Keep every weight, whether it differs or not."""
        for name in self.names:
            self._difference(name)
            self.selected[name] = torch.arange(self.sizes[name], dtype=index_dtype(self.sizes[name]))

    def take_differing(self) -> None:
        """Keep every weight that differs.

        Raises:
            SelectionError: none does.
        """
        for name in self.names:
            delta = SparseDelta.from_dense(self._difference(name))
            self.selected[name] = delta.indices
        if not any(indices.numel() for indices in self.selected.values()):
            raise SelectionError("base and tuned do not differ in any targeted weight, so there is nothing to keep")

    def take_best(self, groups: Sequence[Group], criterion: Scores) -> None:
        """Keep the weights of each group that the criterion ranks highest: exactly as many as the group's count.

        Raises:
            SelectionError: fewer weights of a group differ than it is to keep.
        """
        for group in groups:
            try:
                found = streamed_top_k(self._scores(group.members, criterion), group.count, min_score=0.0)
            except SelectionError as error:
                raise self._explain(group, error) from error
            self.selected.update(found)

    def _scores(self, members: Sequence[str], criterion: Scores) -> Iterator[tuple[str, Tensor]]:
        for name in members:
            difference = self._difference(name)
            # A weight that does not differ is no candidate, whatever denoising makes of it.
            scores = criterion(difference, name).masked_fill_(difference == 0, 0)
            # What is held here while the next tensor is read would double the memory.
            del difference
            yield name, scores
            del scores

    def _explain(self, group: Group, error: SelectionError) -> SelectionError:
        members = [self.measured[name] for name in group.members if name in self.measured]
        differing = sum(measured.differing for measured in members)
        if len(members) < len(group.members) or differing >= group.count:
            return error
        where = "the targeted tensors" if group.name == "global" else f"{group.name!r}"
        size = sum(self.sizes[name] for name in group.members)
        return SelectionError(
            f"{group.count} weights are asked from {where}, but only {differing} of {size} differ between base and "
            "tuned. Ask for fewer, or for num_weights='changed' (--changed) to keep all that differ"
        )

    def gather(self, dtype: torch.dtype) -> tuple[dict[str, SparseDelta], int]:
        """The deltas of the parameters of which anything was taken, and how many tuned weights they do not hit."""
        deltas: dict[str, SparseDelta] = {}
        missed = 0
        for name in self.names:
            if self.selected[name].numel():
                values, misses = self.source.values(name, self.selected[name], dtype)
                deltas[name] = SparseDelta(self.selected[name], values, self.shapes[name])
                missed += misses
            self._advance()
        return deltas, missed

    def report(self, deltas: dict[str, SparseDelta]) -> tuple[Kept, ...]:
        """What the deltas keep of each parameter."""
        rows = []
        for name in self.names:
            differing, squared = self.measured[name].differing, self.measured[name].squared
            kept = measure(deltas[name].values).squared if name in deltas else 0.0
            count = deltas[name].count if name in deltas else 0
            # Rounding must not let more be kept than there is.
            rows.append(Kept(name, self.sizes[name], differing, count, squared, min(kept, squared)))
        return tuple(rows)

"""SpIEL-MA's growth criterion: the best entries of an outer product, without forming it.

An entry's estimate is the product of a number of its row and a number of its column. With the columns sorted, the
entries of a row that reach a threshold are its last ones, so one binary search per row counts them, and a bisection
over thresholds finds one that leaves hardly more entries than are asked for.

All comparisons are exact. A product of two float32 numbers has at most 48 significant bits, so float64 holds it, and
a threshold of at most 48 bits, divided by the number of a row and rounded to float64, still separates the columns whose
product reaches it from those whose product does not: such products differ by more than the rounding of the quotient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.indices import index_dtype, positions
from ..errors import SelectionError
from .replacement import Candidates

# Bits of a float64 that thresholds leave zero, so that they have 50 significant bits.
_UNUSED_BITS = 3
# Entries more than asked for at which sorting them is cheaper than bisecting on.
_SLACK = 4096


def momentum_estimate(rows: Tensor, columns: Tensor, indices: Tensor) -> Tensor:
    """Estimated magnitude of the momentum at flat positions: (rows[i] * columns[j]) ** (1/4), in gradient units.

    Args:
        rows: [O] accumulators of squared gradients, >= 0.
        columns: [I] likewise.
        indices: [n] flat row-major positions.

    Returns:
        [n] float64: the exact product of two fourth roots, each rounded to float32.

    Source: thesis eq. 7.7.
    """
    row, column = _split(indices.long(), columns.numel())
    return _fourth_root(rows)[row] * _fourth_root(columns)[column]


def grow_candidates(rows: Tensor, columns: Tensor, active_indices: Tensor, num: int) -> Candidates:
    """The entries of a weight with the largest momentum estimates among those that are not tuned.

    Args:
        rows: [O] accumulators of squared gradients, >= 0.
        columns: [I] likewise.
        active_indices: [k] flat row-major positions of the tuned entries, sorted and unique.
        num: how many to propose, >= 0.

    Returns:
        Candidates with at most `num` entries: fewer if fewer have an estimate above zero. Scores are those of
        `momentum_estimate`, rounded; of equal ones the lowest index is taken.

    Raises:
        SelectionError: `num` negative; accumulators that are negative, infinite or NaN.

    Cost: O(O + I + k + num) memory, and as much time per bisection; nothing of the size of the weight.
    Source: thesis 7.3.2, algorithm 3. The authors' code forms the whole outer product, with an index per entry, and may
    grow entries whose estimate is zero.
    """
    if num < 0:
        raise SelectionError(f"num must be >= 0, got {num}")
    for name, accumulator in (("rows", rows), ("columns", columns)):
        if not bool((torch.isfinite(accumulator) & (accumulator >= 0)).all()):
            raise SelectionError(
                f"accumulators of the {name} must be finite and >= 0: look for a run that diverged "
                "(lower the learning rate, or clip gradients)"
            )
    best = _Outer(rows, columns, active_indices).best(num)
    scores = momentum_estimate(rows, columns, best).float()
    return Candidates(best.to(index_dtype(rows.numel() * columns.numel())), scores)


def _fourth_root(accumulator: Tensor) -> Tensor:
    return accumulator.float().sqrt().sqrt().double()


def _split(flat: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    row = flat.div(num_columns, rounding_mode="floor")
    return row, flat - row * num_columns


class _Outer:
    """The positive entries of an outer product that are not tuned, ordered by their product."""

    def __init__(self, rows: Tensor, columns: Tensor, active: Tensor) -> None:
        self.active = active.long()
        self.num_columns = columns.numel()
        a, b = _fourth_root(rows), _fourth_root(columns)
        self.row = a.nonzero().squeeze(1)
        self.a = a[self.row]
        sorted_columns, self.column = b.sort(stable=True)
        first = int(torch.searchsorted(sorted_columns, 0.0, right=True))
        self.b, self.column = sorted_columns[first:], self.column[first:]
        active_row, active_column = _split(self.active, max(self.num_columns, 1))
        self.active_row = active_row
        self.active_scores = a[active_row] * b[active_column]
        self.sorted_active_scores = self.active_scores.sort().values

    def best(self, num: int) -> Tensor:
        """[n] int64 sorted flat positions of the `num` best, or of all if there are fewer."""
        if num == 0 or self.a.numel() == 0 or self.b.numel() == 0:
            return self.active.new_empty(0)
        # `low` admits at least `num` entries (or all), `high` fewer.
        low, high = _key(self.a.min() * self.b.min()), _key(self.a.max() * self.b.max()) + 1
        admitted = self._count(low)
        while admitted > num + _SLACK and high - low > 1:
            middle = (low + high) // 2
            count = self._count(middle)
            if count >= num:
                low, admitted = middle, count
            else:
                high = middle
        if admitted > num + _SLACK:
            # More than `_SLACK` equal products: those above them, and the first of themselves.
            above = self._entries(self._per_row(high))
            return torch.cat([above, self._ties(low, high, num - above.numel())]).sort().values
        entries = self._entries(self._per_row(low)).sort().values
        row, column = _split(entries, self.num_columns)
        order = self._product(row, column).sort(descending=True, stable=True).indices
        return entries[order[:num]].sort().values

    def _product(self, row: Tensor, column: Tensor) -> Tensor:
        by_row = self.a.new_zeros(int(self.row[-1]) + 1).index_copy_(0, self.row, self.a)
        by_column = self.b.new_zeros(self.num_columns).index_copy_(0, self.column, self.b)
        return by_row[row] * by_column[column]

    def _per_row(self, key: int) -> Tensor:
        """[rows] how many entries of each row reach a threshold, tuned ones included."""
        return self.b.numel() - torch.searchsorted(self.b, _threshold(key, self.b.device) / self.a)

    def _count(self, key: int) -> int:
        tuned_below = torch.searchsorted(self.sorted_active_scores, _threshold(key, self.b.device))
        return int(self._per_row(key).sum() - self.active.numel() + tuned_below)

    def _entries(self, counts: Tensor) -> Tensor:
        """Flat positions of the last `counts` sorted columns of each row, less the tuned ones."""
        return self._untuned(*self._spread(counts, torch.zeros_like(counts)))

    def _ties(self, low: int, high: int, num: int) -> Tensor:
        """The `num` lowest flat positions among the entries whose product equals the threshold `low`."""
        below, reach = self._per_row(high), self._per_row(low)
        tied_active = self.active_row[self.active_scores == _threshold(low, self.b.device)]
        where, _ = positions(self.row, tied_active)
        eligible = (reach - below).sub_(torch.bincount(where, minlength=self.row.numel()))
        # Rows come in ascending order, so no row after the one that completes the number is needed.
        last = int(torch.searchsorted(eligible.cumsum(0), num)) + 1
        return self._untuned(*self._spread((reach - below)[:last], below[:last])).sort().values[:num]

    def _spread(self, counts: Tensor, skipped: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column of `counts` entries of each row, after the `skipped` best of it."""
        which = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
        start = counts.cumsum(0) - counts
        rank = torch.arange(which.numel(), device=counts.device) - start[which] + skipped[which]
        return self.row[which], self.column[self.b.numel() - 1 - rank]

    def _untuned(self, row: Tensor, column: Tensor) -> Tensor:
        flat = row * self.num_columns + column
        _, found = positions(self.active, flat)
        return flat[~found]


def _key(product: Tensor) -> int:
    """An integer with the order of positive products: the float64's bits, less the unused."""
    return int(product.view(torch.int64)) >> _UNUSED_BITS


def _threshold(key: int, device: torch.device) -> Tensor:
    # A tensor: torch.searchsorted takes a Python number for a float32.
    return torch.tensor(key << _UNUSED_BITS, dtype=torch.int64, device=device).view(torch.float64)

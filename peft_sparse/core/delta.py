"""SparseDelta: the one data type of the library, a sparse difference on a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .indices import check_indices, index_dtype


@dataclass(frozen=True, eq=False)
class SparseDelta:
    """Values to add to a weight at some of its flat positions.

    Attributes:
        indices: [k] flat row-major positions, strictly ascending; int32, or int64 for weights of 2**31 elements and
            more.
        values: [k] floating point, in the units of the weight.
        shape: shape of the weight.
    """

    indices: Tensor
    values: Tensor
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """k, the number of tuned weights."""
        return self.indices.numel()

    @property
    def numel(self) -> int:
        """Number of elements of the weight."""
        return prod(self.shape)

    def check(self, *, name: str = "the delta") -> SparseDelta:
        """Return `self` if indices and values fit the shape and each other, else raise a ValueError with `name`."""
        check_indices(self.indices, self.numel, name=name)
        if self.values.shape != self.indices.shape:
            found = f"{tuple(self.values.shape)} values for {tuple(self.indices.shape)} indices"
            raise ValueError(f"values of {name} must have one entry per index, got {found}")
        return self

    def to_dense(self, *, dtype: torch.dtype | None = None) -> Tensor:
        """The difference as a dense tensor of `shape` (dtype of the values if none is given)."""
        dense = torch.zeros(self.numel, dtype=dtype or self.values.dtype, device=self.values.device)
        dense[self.indices.long()] = self.values.detach().to(dense.dtype)
        return dense.view(self.shape)

    @staticmethod
    def from_dense(difference: Tensor) -> SparseDelta:
        """The non-zero entries of a dense difference."""
        flat = difference.reshape(-1)
        indices = flat.nonzero().squeeze(1)
        return SparseDelta(indices.to(index_dtype(flat.numel())), flat[indices], tuple(difference.shape))

    @staticmethod
    def empty(shape: Sequence[int], *, dtype: torch.dtype = torch.float32) -> SparseDelta:
        """A delta that changes nothing."""
        return SparseDelta(torch.empty(0, dtype=index_dtype(prod(shape))), torch.empty(0, dtype=dtype), tuple(shape))

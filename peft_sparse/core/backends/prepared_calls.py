"""Calls of the C++ kernels whose arguments are prepared once, for layers that make them for every token."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .native import TYPES, Kernels


class SparseProduct:
    """Adds `x @ D.T` to an output, where D are the sparse entries on a weight. The arguments are prepared once.

    Args:
        kernels: the library.
        indices: [k] sorted and unique positions in the weight, contiguous; kept.
        dtype: of the weight and of the inputs, float32 or bfloat16.
        shape: of the weight.
        row_is_output: an entry's row is the number of the output, and its column that of the input.
    """

    class _Entries(ctypes.Structure):
        _fields_ = (
            ("indices", ctypes.c_void_p),
            *((name, ctypes.c_int64) for name in ("count", "columns", "inputs", "outputs")),
            *((name, ctypes.c_int32) for name in ("type", "is_wide", "row_is_output", "level")),
        )

    __slots__ = ("_address", "_call", "_entries", "_indices", "_input_bytes", "_output_bytes")

    def __init__(
        self,
        kernels: Kernels,
        indices: Tensor,
        *,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        row_is_output: bool,
    ) -> None:
        rows, columns = shape
        inputs, outputs = (columns, rows) if row_is_output else (rows, columns)
        # Another tensor on the memory that the address is of, whatever becomes of the first one.
        self._indices = indices.detach()
        self._input_bytes, self._output_bytes = inputs * dtype.itemsize, outputs * dtype.itemsize
        self._entries = self._Entries(
            indices.data_ptr(),
            *(indices.numel(), columns, inputs, outputs),
            *(TYPES[dtype], int(indices.dtype == torch.int64), int(row_is_output), kernels.level),
        )
        self._address = ctypes.addressof(self._entries)
        self._call = kernels._add_product  # type: ignore[attr-defined]

    def add_(self, y: Tensor, x: Tensor, num_rows: int, weight: Tensor, values: Tensor, *, first_row: int = 0) -> None:
        """Add `x @ D.T` to `y` in place (`x @ D` unless `row_is_output`), for some rows.

        Args:
            y: [N, outputs] contiguous, in the dtype of the product.
            x: [N, inputs] contiguous, same dtype.
            num_rows: how many rows.
            weight: contiguous, same dtype, without the entries: they change it by what is left of them once
                `weight + values` is rounded.
            values: [k] float32, contiguous.
            first_row: where they begin.
        """
        inputs = x.data_ptr() + first_row * self._input_bytes
        outputs = y.data_ptr() + first_row * self._output_bytes
        self._call(self._address, inputs, num_rows, outputs, weight.data_ptr(), values.data_ptr())


class BitwiseComparison:
    """A copy of values and of some entries of a weight, to tell later whether they are still the same, bit for bit.

    Args:
        kernels: the library.
        values: [k] contiguous, kept: a copy of the values.
        places: [n] int64 positions in the weight, kept.
        entries: [n] what is there, in a dtype that the kernels know, kept.
    """

    class _Image(ctypes.Structure):
        _fields_ = (
            ("values", ctypes.c_void_p),
            ("size", ctypes.c_int64),
            ("places", ctypes.c_void_p),
            ("entries", ctypes.c_void_p),
            ("num_places", ctypes.c_int64),
            ("width", ctypes.c_int64),
        )

    __slots__ = ("_address", "_call", "_image", "_kept")

    def __init__(self, kernels: Kernels, values: Tensor, places: Tensor, entries: Tensor) -> None:
        self._kept = values, places, entries
        addresses = values.data_ptr(), values.nbytes, places.data_ptr(), entries.data_ptr()
        self._image = self._Image(*addresses, places.numel(), entries.element_size())
        self._address = ctypes.addressof(self._image)
        self._call = kernels._unchanged  # type: ignore[attr-defined]

    def is_same(self, values: Tensor, weight: Tensor) -> bool:
        """Whether values and weight, contiguous and of the same sizes and dtypes as then, have the same bits."""
        return bool(self._call(self._address, values.data_ptr(), weight.data_ptr()))

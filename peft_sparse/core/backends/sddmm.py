"""The gradient of a few weights of a matrix, without the gradient of all of them where that is cheaper.

For `y = x @ W.T` the gradient of W is `grad.T @ x`. Only its entries on the support are wanted: a sampled dense-dense
product (SDDMM). The sampled kernel reads both factors column by column, so its price is mostly their transposes.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from functools import cache
from threading import local

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# The sampled kernel exists for these alone; 16-bit factors are widened first.
_SAMPLED_DTYPES = (torch.float32, torch.float64)


def prefer_sampled(count: int, shape: tuple[int, int], *, dtype: torch.dtype, device: torch.device) -> bool:
    """The one rule that chooses between the sampled and the dense product.

    Args:
        count: number of tuned weights, of all deltas of the weight together.
        shape: [R, C] of the weight.
        dtype: of the factors.
        device: of the factors.
    """
    if device.type != "cpu":
        return False
    numel = shape[0] * shape[1]
    if dtype == torch.float16:
        return True
    limit = 0.01 if dtype == torch.bfloat16 else 0.06
    return count <= limit * numel


def sampled_product(
    grad: Tensor,
    x: Tensor,
    indices: Tensor,
    shape: tuple[int, int],
    *,
    transposed: bool = False,
) -> Tensor:
    """Entries of `grad.T @ x` (of `x.T @ grad` if `transposed`) at flat positions.

    Args:
        grad: [N, O] gradient of the output.
        x: [N, I] input.
        indices: [k] flat row-major positions in the weight, sorted and unique.
        shape: of the weight: [O, I], or [I, O] if `transposed` (transformers' Conv1D).
        transposed: the weight is stored as [I, O].

    Returns:
        [k] float32 (float64 if both factors are), in the order of `indices`.

    Cost: both factors transposed, and 2 N k operations; nothing of the weight's size but 4 bytes for each of its rows.
    """
    return weight_gradients(grad, x, [indices], shape, transposed=transposed, sampled=True)[0]


def weight_gradients(
    grad: Tensor,
    x: Tensor,
    supports: Sequence[Tensor],
    shape: tuple[int, int],
    *,
    transposed: bool = False,
    shared: SharedInput | None = None,
    sampled: bool | None = None,
) -> list[Tensor]:
    """The weight's gradient on each of several supports: `sampled_product` for all, by whichever product is cheaper.

    Args:
        grad: [N, O] gradient of the output.
        x: [N, I] input.
        supports: each [k_i] flat row-major positions, sorted and unique; they may overlap.
        shape: of the weight: [O, I], or [I, O] if `transposed`.
        transposed: the weight is stored as [I, O].
        shared: where to find the transpose of `x`, if other layers read it too.
        sampled: force one of the two products; None lets `prefer_sampled` choose.

    Returns:
        one [k_i] tensor per support, float32 or wider.
    """
    if sampled is None:
        count = sum(support.numel() for support in supports)
        sampled = prefer_sampled(count, shape, dtype=grad.dtype, device=grad.device)
    if not sampled:
        dense = (x.t() @ grad if transposed else grad.t() @ x).reshape(-1)
        return [_wide(dense[support]) for support in supports]
    x_columns = shared.transpose_of(x) if shared is not None else transpose(x)
    factors = (x_columns, transpose(grad)) if transposed else (transpose(grad), x_columns)
    return [_sample(*factors, support, shape) for support in supports]


def transpose(matrix: Tensor) -> Tensor:
    """[C, N] contiguous copy of [N, C], float32 or wider."""
    # First moved, then widened: torch's fast kernel for transposing wants one dtype, and half the bytes move.
    return _wide(matrix.t().contiguous())


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in _SAMPLED_DTYPES else tensor.float()


def _sample(rows: Tensor, columns: Tensor, support: Tensor, shape: tuple[int, int]) -> Tensor:
    """Entries of `rows @ columns.T`, rows [R, N] and columns [C, N], on the support."""
    num_columns = shape[1]
    bounds = torch.arange(0, (shape[0] + 1) * num_columns, num_columns, dtype=support.dtype, device=support.device)
    starts = torch.searchsorted(support, bounds, out_int32=support.dtype == torch.int32)
    _silence_warnings()
    pattern = torch.sparse_csr_tensor(
        starts, support % num_columns, rows.new_zeros(support.numel()), shape, check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, rows, columns.t(), beta=0.0).values()


@cache
def _silence_warnings() -> None:
    # torch warns once per process that CSR support is in beta and that it does not check what it is given. The supports
    # were checked when they were made, and our own tests pin the one operation used here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = torch.empty(0, dtype=torch.int32)
        torch.sparse_csr_tensor(empty.new_zeros(2), empty, torch.empty(0), (1, 1), check_invariants=False)


class SharedInput:
    """The transpose of one input, made once for all layers that read it (q, k and v; gate and up) in one backward pass.

    Only the autograd contexts of those layers own it, so it dies with the graph; it drops the transpose after its last
    reader. The transpose is handed out only for the very memory and version that it was made from.
    """

    __slots__ = ("__weakref__", "_pending", "_readers", "_source", "_transpose")

    def __init__(self) -> None:
        self._readers = 0
        self._pending = 0
        self._source: tuple[object, ...] | None = None
        self._transpose: Tensor | None = None

    def join(self) -> None:
        """Announce one more layer that will ask."""
        self._readers += 1
        self._pending += 1

    def transpose_of(self, x: Tensor) -> Tensor:
        """`transpose(x)`, from the reader before if there was one."""
        source = (StorageWeakRef(x.untyped_storage()), x._version, x.storage_offset(), x.shape, x.stride(), x.dtype)
        kept, result = self._source, self._transpose
        if result is None or kept != source:
            result = transpose(x)
        self._pending -= 1
        if self._pending > 0:
            self._source, self._transpose = source, result
        else:
            self._source, self._transpose, self._pending = None, None, self._readers
        return result


class _Last(local):
    entry: tuple[weakref.ref[Tensor], int, weakref.ref[SharedInput]] | None = None


_last = _Last()


def share_input(x: Tensor) -> SharedInput:
    """The `SharedInput` of the layers that read `x`: that of the call before, if it was for the same tensor."""
    if _last.entry is not None:
        tensor, version, reference = _last.entry
        shared = reference()
        if shared is not None and tensor() is x and version == x._version:
            return shared
    shared = SharedInput()
    _last.entry = (weakref.ref(x), x._version, weakref.ref(shared))
    return shared

"""The gradient of a few weights of a matrix, without the gradient of all of them where that is cheaper.

For `y = x @ W.T` the gradient of W is `grad.T @ x`. Only its entries on the support are wanted: a sampled dense-dense
product (SDDMM). Its kernel reads both factors column by column, so a good part of its price are their transposes. Ours
(`native`) makes them a tile at a time; where it cannot be compiled, torch's does the same more slowly.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from threading import local

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .native import Kernels, compiled, kernels
from .products import computed_on, entries_of_product, layout_of, wide_product

# The sampled kernel exists for these alone; 16-bit factors are widened first.
_SAMPLED_DTYPES = (torch.float32, torch.float64)
_NATIVE_DTYPES = (*_SAMPLED_DTYPES, torch.bfloat16, torch.float16)

# Rows of the batch that are transposed and multiplied at a time, so that both transposes stay in the processor's cache:
# on [4096 x 2048] by [4096 x 2048] at density 0.05 blocks of 512 take 60 ms on one core, everything at once 126 ms.
_BLOCK_ROWS = 512


def prefer_sampled(count: int, shape: tuple[int, int], *, device: torch.device) -> bool:
    """The one rule that chooses between the sampled and the dense product.

    With the kernels of `native`, measured on AVX2 cores (32 to 2048 rows, weights of 512 to 2048 rows and columns) as
    shares of the dense product's time: an entry costs 5 to 6 times as much when sampled, and packing as much as 25
    dense entries for each row and column. All of it is spread over the cores as the dense product is.

    With torch's kernel (AVX-512 cores, torch 2.13, 8 to 2048 rows, weights of 64 to 2048 rows and columns) an entry
    costs about 4 times as much when sampled. Both transposes run on one core however many the dense product has, and
    cost as much as 30 dense entries for each row and column. So on two cores the ways meet at density 0.13 for
    [512 x 512] and 0.24 for [2048 x 2048].

    On accelerators the dense product runs on matrix units; it is taken there always.

    Args:
        count: number of tuned weights, of all deltas of the weight together.
        shape: [R, C] of the weight, or of the rows that hold tuned weights, see `shape_in_use`.
        device: of the factors. Their dtype decides nothing, for those of 16 bits are widened for either product.
    """
    if computed_on(device) != "cpu":
        return False
    rows, columns = shape
    if compiled() is not None:
        return 6 * count + 25 * (rows + columns) <= rows * columns
    return 4 * count + 30 * torch.get_num_threads() * (rows + columns) <= rows * columns


def shape_in_use(supports: Sequence[Tensor], shape: tuple[int, int]) -> tuple[int, int]:
    """[R, C] of the product that a CPU has to make for some supports of a weight: see `products.Layout`."""
    if not supports or any(support.device.type != "cpu" for support in supports):
        return shape
    layout = layout_of(supports, shape)
    return layout.num_rows, layout.num_columns


def weight_gradients(
    grad: Tensor,
    x: Tensor,
    supports: Sequence[Tensor | None],
    shape: tuple[int, int],
    *,
    sampled: bool,
    transposed: bool = False,
    shared: SharedInput | None = None,
) -> list[Tensor]:
    """The weight's gradient on each of several supports, by either product.

    Args:
        grad: [N, O] gradient of the output.
        x: [N, I] input.
        supports: each [k_i] flat row-major positions, sorted and unique; they may overlap. None stands for all of the
            weight, and takes the dense product.
        shape: of the weight: [O, I], or [I, O] if `transposed`.
        sampled: which product: see `prefer_sampled`.
        transposed: the weight is stored as [I, O].
        shared: where to find the transpose of `x`, if other layers read it too.

    Returns:
        one [k_i] tensor per support, float32 or wider.
    """
    wanted = [support for support in supports if support is not None]
    left, right = (x, grad) if transposed else (grad, x)
    if not sampled or len(wanted) < len(supports):
        if shared is not None and sampled:
            shared.leave()
        if len(wanted) == len(supports):
            return entries_of_product(left, right, wanted)
        whole = wide_product(left, right).view(-1)
        return [whole if support is None else whole.index_select(0, support) for support in supports]
    layout = layout_of(wanted, shape)
    if layout.rows is not None:
        left = left.index_select(1, layout.rows)
        if transposed and shared is not None:
            # What other layers make of the input is of all of its columns.
            shared.leave()
            shared = None
    shape = (layout.num_rows, layout.num_columns)
    places = [layout.places(support) for support in wanted]
    native = kernels(left, right, dtypes=_NATIVE_DTYPES)
    if native is not None:
        return _by_kernels(native, left, right, places, x=x, transposed=transposed, shared=shared)
    x_blocks = shared.transposed(x) if shared is not None else _transposed_blocks(left if transposed else right)
    patterns = [_pattern(place, shape, _wide(grad[:0]).dtype) for place in places]
    for block, x_columns in zip((right if transposed else left).split(_BLOCK_ROWS), x_blocks, strict=True):
        grad_columns = _transposed(block)
        left_columns, right_columns = (x_columns, grad_columns) if transposed else (grad_columns, x_columns)
        for pattern in patterns:
            torch.sparse.sampled_addmm(pattern, left_columns, right_columns.t(), out=pattern)
    return [pattern.values() for pattern in patterns]


def _by_kernels(
    native: Kernels,
    left: Tensor,
    right: Tensor,
    places: list[Tensor],
    *,
    x: Tensor,
    transposed: bool,
    shared: SharedInput | None,
) -> list[Tensor]:
    """`weight_gradients` sampled by the kernels, which pack what no other layer packs."""
    if left.dtype != right.dtype or left.dtype == torch.float16:
        dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
        left, right = left.to(dtype), right.to(dtype)
    if shared is None:
        return native.sampled(left, right, places)
    if not shared.is_read_again:
        shared.leave()
        return native.sampled(left, right, places)
    (packed,) = shared.transposed(x, lambda x: [native.pack(x.to(left.dtype))])
    return native.sampled(left, right, places, **{"packed_left" if transposed else "packed_right": packed})


def _transposed(matrix: Tensor) -> Tensor:
    """[C, N] contiguous copy of [N, C], float32 or wider."""
    # First moved, then widened: torch's fast kernel for transposing wants one dtype, and half the bytes move.
    return _wide(matrix.t().contiguous())


def _transposed_blocks(matrix: Tensor) -> list[Tensor]:
    return [_transposed(block) for block in matrix.split(_BLOCK_ROWS)]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in _SAMPLED_DTYPES else tensor.float()


def _pattern(support: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """CSR matrix of zeros on a support. Made anew each time, for that takes microseconds and no memory stays."""
    num_rows, num_columns = shape
    bounds = torch.arange(0, (num_rows + 1) * num_columns, num_columns, dtype=support.dtype, device=support.device)
    starts = torch.searchsorted(support, bounds, out_int32=support.dtype == torch.int32)
    _silence_warnings()
    zeros = torch.zeros(support.numel(), dtype=dtype, device=support.device)
    return torch.sparse_csr_tensor(starts, support % num_columns, zeros, shape, check_invariants=False)


@cache
def _silence_warnings() -> None:
    # torch warns once per process that CSR support is in beta and that it does not check what it is given. The supports
    # were checked when they were made, and our own tests pin the one operation used here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = torch.empty(0, dtype=torch.int32)
        torch.sparse_csr_tensor(empty.new_zeros(2), empty, torch.empty(0), (1, 1), check_invariants=False)


class SharedInput:
    """What the layers that read one input (q, k and v; gate and up) make of it once for all: its transpose in a
    backward pass, its copy in the dtype of autocast.

    Only the autograd contexts of those layers own it, so it dies with the graph; it drops the transpose after its last
    reader. The transpose is handed out only for the very memory and version that it was made from.
    """

    __slots__ = ("__weakref__", "_blocks", "_narrow", "_pending", "_readers", "_source")

    def __init__(self) -> None:
        self._readers = 0
        self._pending = 0
        self._source: tuple[object, ...] | None = None
        self._blocks: list[Tensor] | None = None
        self._narrow: weakref.ref[Tensor] | None = None

    def join(self) -> None:
        """Announce one more layer that will ask."""
        self._readers += 1
        self._pending += 1

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` in the dtype of autocast: the very copy that an earlier reader saved for its backward, if one did."""
        kept = self._narrow() if self._narrow is not None else None
        if kept is None or kept.dtype != dtype:
            kept = x.to(dtype)
            self._narrow = weakref.ref(kept)
        return kept

    @property
    def is_read_again(self) -> bool:
        """Whether what is made of the input will have more than one reader."""
        return self._readers > 1

    def transposed(self, x: Tensor, make: Callable[[Tensor], list[Tensor]] | None = None) -> list[Tensor]:
        """The transposed blocks of `x`, or what `make` makes of it, from the reader before if there was one."""
        memory = StorageWeakRef(x.untyped_storage()), x._version, x.storage_offset(), x.shape, x.stride(), x.dtype
        source = (make is None, *memory)
        kept, blocks = self._source, self._blocks
        if blocks is None or kept != source:
            blocks = (make or _transposed_blocks)(x)
        self._source, self._blocks = source, blocks
        self.leave()
        return blocks

    def leave(self) -> None:
        """One reader fewer to come; the last one takes the transpose along."""
        self._pending -= 1
        if self._pending <= 0:
            self._source, self._blocks, self._pending = None, None, self._readers


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

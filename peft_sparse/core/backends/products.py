"""Entries of a dense product of two factors, in float32 or wider, without the whole product in memory.

On matrix units the product of all rows costs about as much as any way to compute one entry in a hundred, so it is made:
a tile of rows at a time, of which the wanted entries are read while it is in the cache. Where the wanted entries keep
to a part of the rows, only those rows are multiplied.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# Bytes of a tile of the product. Measured on an H100 (bfloat16, 2,048 tokens, as many entries as LoRA of rank 64), in
# ms, for [4096 x 4096], [11008 x 4096] and [4096 x 11008]: the product alone 0.11, 0.32 and 0.32, in float32 with all
# entries read 0.16, 0.44 and 0.47 by tiles of 128 MiB, 0.28, 1.46 and 1.65 by 16 MiB, where launching takes the time. A
# triton kernel that reads the entries of a tile as soon as it is made took 0.19, 0.48 and 0.40 at best, over the seven
# matrices of a layer more than the tiles (2.1 and 2.0), so there is none.
TILE_BYTES = 2**27
# A tile is a multiple of so many rows, the height of a matrix unit's own tiles.
_TILE_STEP = 128
# Above this share of rows in use, picking them out costs more than it saves.
_WORTH_CONFINING = 0.5


# The kind of device that tensors without data are treated as being on.
_meta_stands_for = "meta"


@contextmanager
def meta_stands_for(device_type: str) -> Iterator[None]:
    """Let tensors on the meta device take the way that they would take on another one (the memory planner runs steps
    there).
    """
    global _meta_stands_for
    before, _meta_stands_for = _meta_stands_for, device_type
    try:
        yield
    finally:
        _meta_stands_for = before


def computed_on(device: torch.device) -> str:
    """The type of a device, or of the one that the meta device stands for."""
    return _meta_stands_for if device.type == "meta" else device.type


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """`left.T @ right` in float32, or in float64 if that is the factors' dtype: never rounded to 16 bits.

    Args:
        left: [N, R].
        right: [N, C], same dtype.

    Returns:
        [R, C].

    Cost: 16-bit factors are multiplied as they are on NVIDIA's GPUs, and widened first elsewhere, and where the product
        is to be differentiated again.
    """
    if left.dtype not in (torch.bfloat16, torch.float16):
        return left.t() @ right
    if left.is_meta and computed_on(left.device) == "cuda":
        return torch.empty(left.shape[1], right.shape[1], dtype=torch.float32, device="meta")
    if left.is_cuda and torch.version.hip is None and not torch.is_grad_enabled():
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return left.float().t() @ right.float()


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the entries of some supports lie in the product that has to be made for them.

    Attributes:
        rows: [R] int64 ascending, the rows of the weight that hold entries, where that is a part worth picking out;
            None for all rows.
        num_rows: R, or the number of all rows.
        num_columns: C.
        shift: [num_rows of the weight] what a flat position in the weight is ahead of that in the [R, C] product, by
            row; None if `rows` is.
        firsts: for each support, which of its entries is the first of each tile, and their number at the end.
        tile_rows: rows in a tile.
    """

    rows: Tensor | None
    num_rows: int
    num_columns: int
    shift: Tensor | None
    firsts: tuple[tuple[int, ...], ...]
    tile_rows: int

    def places(self, support: Tensor) -> Tensor:
        """[k] flat positions in the [R, C] product of flat positions in the weight."""
        if self.shift is None:
            return support
        return support - self.shift[support // self.num_columns]


def layout_of(supports: Sequence[Tensor], shape: tuple[int, int]) -> Layout:
    """The layout for some supports of a weight.

    Args:
        supports: each [k_i] flat row-major, sorted and unique.
        shape: of the weight.

    Cost: a binary search per row and support, and on an accelerator a wait for it. It is remembered for as long as the
        supports live unchanged.
    """
    key = (*(_identity(support) for support in supports), shape, TILE_BYTES)
    found = _layouts.get(key)
    if found is None:
        found = _Remembered([StorageWeakRef(s.untyped_storage()) for s in supports], _lay_out(supports, shape))
        with _lock:
            _forget_dead()
            _layouts[key] = found
    return found.layout


def entries_of_product(left: Tensor, right: Tensor, supports: Sequence[Tensor]) -> list[Tensor]:
    """Entries of `left.T @ right` at flat positions.

    Args:
        left: [N, R] floating point.
        right: [N, C], same dtype.
        supports: each [k_i] flat row-major positions in [R, C], sorted and unique.

    Returns:
        one [k_i] tensor per support, float32 (float64 if the factors are).

    Cost: the product of the rows that hold entries, `TILE_BYTES` of it in memory at a time; off CUDA, float32 copies of
        16-bit factors.
    """
    layout = layout_of(supports, (left.shape[1], right.shape[1]))
    if layout.rows is not None:
        left = left.index_select(1, layout.rows)
    if computed_on(left.device) != "cuda" and left.dtype in (torch.bfloat16, torch.float16):
        left, right = left.float(), right.float()
    places = [layout.places(support) for support in supports]
    dtype = torch.promote_types(left.dtype, torch.float32)
    if layout.num_rows <= layout.tile_rows:
        whole = wide_product(left, right).view(-1)
        return [whole.index_select(0, place) for place in places]
    found = [torch.empty(place.numel(), dtype=dtype, device=left.device) for place in places]
    for number, first_row in enumerate(range(0, layout.num_rows, layout.tile_rows)):
        spans = [slice(firsts[number], firsts[number + 1]) for firsts in layout.firsts]
        if all(span.start == span.stop for span in spans):
            continue
        tile = wide_product(left[:, first_row : first_row + layout.tile_rows], right).view(-1)
        for span, place, result in zip(spans, places, found, strict=True):
            inside = place[span] - first_row * layout.num_columns if first_row else place[span]
            torch.index_select(tile, 0, inside, out=result[span])
        del tile  # or it would still be there while the next one is made
    return found


@dataclass(frozen=True, eq=False)
class _Remembered:
    # While these are held, no other memory gets the identity of the supports'.
    storages: list[StorageWeakRef]
    layout: Layout


_layouts: dict[tuple[object, ...], _Remembered] = {}
# Held while layouts are added and dropped: replicas of `nn.DataParallel` and servers compute in threads.
_lock = threading.Lock()
_sweep_at = 256


def _identity(support: Tensor) -> tuple[object, ...]:
    version = 0 if support.is_inference() else support._version
    return support.untyped_storage()._cdata, support.storage_offset(), support.numel(), support.dtype, version


def _forget_dead() -> None:
    """Drop the layouts of supports that are gone, whenever there are twice as many as after the last time."""
    global _sweep_at
    if len(_layouts) >= _sweep_at:
        for key, remembered in list(_layouts.items()):
            if any(storage.expired() for storage in remembered.storages):
                _layouts.pop(key, None)
        _sweep_at = max(256, 2 * len(_layouts))


def _lay_out(supports: Sequence[Tensor], shape: tuple[int, int]) -> Layout:
    num_rows, num_columns = shape
    tile_rows = max(1, TILE_BYTES // max(1, 4 * num_columns))
    tile_rows = max(_TILE_STEP, tile_rows // _TILE_STEP * _TILE_STEP)
    if any(support.is_meta for support in supports):
        # Nobody knows where the entries lie: as if everywhere.
        num_tiles = -(-num_rows // tile_rows)
        even = (tuple(s.numel() * tile // num_tiles for tile in range(num_tiles + 1)) for s in supports)
        return Layout(None, num_rows, num_columns, None, tuple(even), tile_rows)
    first_of_row = [_first_entries(support, num_rows, num_columns) for support in supports]
    in_use = torch.stack([first.diff() for first in first_of_row]).any(0).nonzero().squeeze(1)
    rows = in_use if 0 < in_use.numel() <= _WORTH_CONFINING * num_rows else None
    used = num_rows if rows is None else in_use.numel()
    starts = torch.arange(0, used, tile_rows, device=in_use.device)
    begins = starts if rows is None else rows[starts]
    firsts = tuple((*first[begins].tolist(), s.numel()) for first, s in zip(first_of_row, supports, strict=True))
    shift = None
    if rows is not None:
        shift = torch.zeros(num_rows, dtype=supports[0].dtype, device=rows.device)
        ahead = (rows - torch.arange(used, device=rows.device)) * num_columns
        shift[rows] = ahead.to(shift.dtype)
    return Layout(rows, used, num_columns, shift, firsts, tile_rows)


def _first_entries(support: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """[num_rows + 1] int64: which entry of a sorted support is the first of each row or of a later one."""
    bounds = torch.arange(num_rows + 1, device=support.device) * num_columns
    # The last bound of a tensor of just under 2**31 elements still fits int32; searching wants one dtype.
    return torch.searchsorted(support, bounds.to(support.dtype))

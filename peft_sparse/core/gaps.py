"""Gap coding: a sorted support as a self-describing uint8 tensor, about one byte per index at density 0.01.

A coded support is, in this order and little endian throughout:

| bytes | content |
|---|---|
| 1 | version, 1 |
| 1 | p, the Rice parameter |
| 1 | number of dimensions |
| 8 per dimension | the shape of the indexed tensor |
| 8 | k, the number of indices |
| ceil((k + sum(gap >> p)) / 8) | unary block: for each gap, `gap >> p` zero bits and then a one bit |
| ceil(k * p / 8) | low block: p bit planes of k bits each, lowest plane first: bit j of every gap, then bit j + 1, .. |

A gap is the difference to the previous index minus one; the first gap is the first index. Bits fill each byte from its
least significant end. Since the two halves of a code word lie in separate blocks, numpy decodes them without a loop.

A support has exactly one encoding: padding bits are zero, the unary block ends in the byte of its last one bit, and p
is the smallest of the parameters that give the fewest bits. Decoding refuses anything else.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import FormatError
from .indices import check_indices, index_dtype

VERSION = 1
# Keeps every intermediate sum of a hostile file below 2**63; no tensor that fits a machine comes near it.
MAX_NUMEL = 2**60

_PREFIX = struct.Struct("<BBB")
_WORD = 8
# How many bits more than the longest encoding are let pass by the first check; `_decode_payload` checks exactly.
_SLACK_BITS = 8192

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class GapHeader:
    """What a coded support says about itself.

    Attributes:
        parameter: p, the Rice parameter: how many low bits of each gap are stored as they are.
        shape: shape of the indexed tensor.
        count: k, the number of indices.
    """

    parameter: int
    shape: tuple[int, ...]
    count: int

    @property
    def num_bytes(self) -> int:
        """Size of the header in the file."""
        return _PREFIX.size + _WORD * (len(self.shape) + 1)

    def pack(self) -> bytes:
        """The header as it is in the file."""
        words = (*self.shape, self.count)
        return _PREFIX.pack(VERSION, self.parameter, len(self.shape)) + struct.pack(f"<{len(words)}Q", *words)


def encode_gaps(indices: Tensor, shape: Sequence[int]) -> Tensor:
    """Code a support as bytes, without loss.

    Args:
        indices: [k] flat row-major positions, strictly ascending, in the dtype of `index_dtype`.
        shape: shape of the tensor that they index; fewer than 2**60 elements, at most 255 dimensions.

    Returns:
        [n] uint8 on the CPU, as the head of this module describes.

    Raises:
        ValueError: `shape` or `indices` do not describe a support.

    Cost: about 30 bytes of scratch memory per index.
    """
    shape = tuple(int(size) for size in shape)
    if len(shape) > 255 or any(not 0 <= size < MAX_NUMEL for size in shape) or prod(shape) >= MAX_NUMEL:
        raise ValueError(f"shape must have at most 255 sizes >= 0 and fewer than 2**60 elements, got {shape}")
    check_indices(indices, prod(shape), name=f"a support of shape {shape}")
    flat: NDArray[Any] = indices.detach().cpu().numpy()
    gaps = _gaps_of(flat)
    parameter = _best_parameter(gaps)
    header = GapHeader(parameter, shape, flat.size).pack()
    blocks = (np.frombuffer(header, dtype=np.uint8), _pack_unary(gaps >> parameter), _pack_low(gaps, parameter))
    return torch.from_numpy(np.concatenate(blocks))


def decode_gaps(
    coded: Tensor, *, name: str, shape: Sequence[int] | None = None, count: int | None = None
) -> tuple[Tensor, tuple[int, ...]]:
    """Read a support back from its bytes, trusting none of them.

    Args:
        coded: [n] uint8, what `encode_gaps` returned.
        name: what errors call the tensor.
        shape: the shape that the support must have; by default any.
        count: the number of indices that it must have; by default any.

    Returns:
        indices [k] on the CPU, sorted, unique and in range, in the dtype of `index_dtype`; the shape.

    Raises:
        FormatError: `coded` is not the one encoding of a support, or not of one with this shape and count.

    Cost: memory is bounded by the bytes in `coded` (a few hundred for each), whatever its header claims.
    """
    header = read_header(coded, name=name)
    if shape is not None and tuple(shape) != header.shape:
        raise FormatError(f"{name}: the support is for shape {header.shape}, but the weight has shape {tuple(shape)}")
    if count is not None and count != header.count:
        raise FormatError(f"{name}: the support holds {header.count} indices, but {count} are expected")
    payload = coded.detach().cpu().contiguous().numpy()[header.num_bytes :]
    indices: NDArray[Any] = _decode_payload(payload, header, name)
    return torch.from_numpy(indices), header.shape


def read_header(coded: Tensor, *, name: str) -> GapHeader:
    """Read and check the header of a coded support: its shape and count without decoding the rest.

    Args:
        coded: [n] uint8.
        name: what errors call the tensor.

    Returns:
        The header; its count fits both its shape and the number of bytes that follow.

    Raises:
        FormatError: not a one-dimensional uint8 tensor with data, cut short, of an unknown version, or contradictory.
    """
    if coded.dtype != torch.uint8 or coded.dim() != 1:
        found = f"{coded.dtype} of shape {tuple(coded.shape)}"
        raise FormatError(f"{name}: a coded support must be a one-dimensional torch.uint8 tensor, got {found}")
    if coded.is_meta:
        raise FormatError(f"{name}: a coded support must hold data, got a tensor on the meta device")
    prefix = bytes(coded[: _PREFIX.size].tolist())
    if len(prefix) < _PREFIX.size:
        raise FormatError(f"{name}: the header of the support is cut short, {len(prefix)} bytes")
    version, parameter, ndim = _PREFIX.unpack(prefix)
    if version != VERSION:
        known = f"this peft_sparse reads version {VERSION}"
        raise FormatError(f"{name}: the support is coded in version {version}, {known}; a newer release may read it")
    rest = bytes(coded[_PREFIX.size : _PREFIX.size + _WORD * (ndim + 1)].tolist())
    if len(rest) < _WORD * (ndim + 1):
        raise FormatError(f"{name}: the header of the support is cut short, {_PREFIX.size + len(rest)} bytes")
    *dims, count = struct.unpack(f"<{ndim + 1}Q", rest)
    header = GapHeader(parameter, tuple(dims), count)
    _check_header(header, payload_bits=8 * (coded.numel() - header.num_bytes), name=name)
    return header


def _check_header(header: GapHeader, *, payload_bits: int, name: str) -> None:
    """Refuse a header that contradicts itself or the size of what follows."""
    numel = prod(header.shape)
    if numel >= MAX_NUMEL or any(size >= MAX_NUMEL for size in header.shape):
        raise FormatError(f"{name}: the support claims the shape {header.shape}, which no tensor can have")
    if header.count > numel:
        raise FormatError(f"{name}: the support claims {header.count} indices into {numel} elements")
    # The best parameter always satisfies this (a larger one costs one more bit per index and saves less than that).
    if header.parameter > 0 and (header.count == 0 or header.count << (header.parameter - 1) >= numel):
        found = f"Rice parameter {header.parameter} for {header.count} indices into {numel} elements"
        raise FormatError(f"{name}: {found} is not the one with the fewest bits")
    needed = header.count * (header.parameter + 1)
    if needed > payload_bits:
        found = f"{payload_bits // 8} bytes follow the header"
        raise FormatError(f"{name}: the support is cut short, {found}, {header.count} indices need {-(-needed // 8)}")
    # With the best parameter the zeros of the unary block are at most two for each index: one more plane would save
    # half of them, and costs one bit for each.
    if payload_bits > needed + 2 * header.count + _SLACK_BITS:
        found = f"{payload_bits // 8} bytes follow the header"
        raise FormatError(f"{name}: the support is longer than its {header.count} indices need, {found}")


def _decode_payload(payload: Bytes, header: GapHeader, name: str) -> NDArray[Any]:
    """The indices behind a checked header."""
    count, parameter, numel = header.count, header.parameter, prod(header.shape)
    dtype = np.int32 if index_dtype(numel) == torch.int32 else np.int64
    if count == 0:
        if payload.size:
            raise FormatError(f"{name}: the support is empty, but {payload.size} bytes follow its header")
        return np.empty(0, dtype=dtype)
    split = payload.size - -(-count * parameter // 8)
    ends = _unary_ends(payload[:split], count, name)
    # Before any index is formed: the upper parts alone must stay inside the tensor, and so inside int64.
    quotient_sum = int(ends[-1]) - (count - 1)
    if quotient_sum << parameter >= numel:
        raise FormatError(f"{name}: an index lies outside [0, {numel})")
    indices = _indices_from(ends, _unpack_low(payload[split:], count, parameter, name), parameter)
    if int(indices[-1]) >= numel:
        raise FormatError(f"{name}: an index lies outside [0, {numel}): {int(indices[-1])}")
    indices = indices.astype(dtype)
    if not _is_best_parameter(_gaps_of(indices), parameter):
        raise FormatError(f"{name}: Rice parameter {parameter} for this support is not the one with the fewest bits")
    return indices


def _gaps_of(indices: NDArray[Any]) -> NDArray[Any]:
    """[k] differences to the previous index minus one, in the dtype of the indices."""
    gaps = np.diff(indices, prepend=indices.dtype.type(-1))
    gaps -= 1
    return gaps


def _indices_from(ends: NDArray[np.int64], low: NDArray[np.int64], parameter: int) -> NDArray[np.int64]:
    """The running sum of all gaps: `ends[i] - i` is the sum of the quotients up to gap i. Overwrites its inputs."""
    order = np.arange(ends.size, dtype=np.int64)
    ends -= order
    ends <<= parameter
    ends += np.cumsum(low, out=low)
    ends += order
    return ends


def _best_parameter(gaps: NDArray[Any]) -> int:
    """The smallest parameter with the fewest bits. The size is convex in it: go on from a guess while that pays."""
    if not gaps.size:
        return 0
    # That of gaps which all have the mean length; those of random supports are exponentially distributed.
    parameter = max(0, (int(gaps.sum(dtype=np.int64)) // gaps.size).bit_length() - 1)
    while parameter > 0 and _bits_saved_by_next(gaps >> (parameter - 1)) <= 0:
        parameter -= 1
    while _bits_saved_by_next(gaps >> parameter) > 0:
        parameter += 1
    return parameter


def _is_best_parameter(gaps: NDArray[Any], parameter: int) -> bool:
    """Whether `_best_parameter` would return this one: better than its left neighbour, not worse than its right one."""
    if parameter > 0 and _bits_saved_by_next(gaps >> (parameter - 1)) <= 0:
        return False
    return _bits_saved_by_next(gaps >> parameter) <= 0


def _bits_saved_by_next(upper: NDArray[Any]) -> int:
    """How many bits the next larger parameter saves, given the upper parts of the gaps with the present one."""
    halved = int(upper.sum(dtype=np.int64)) - int((upper >> 1).sum(dtype=np.int64))
    return halved - upper.size


def _pack_unary(quotients: NDArray[Any]) -> Bytes:
    """Each quotient as that many zeros and a one."""
    ends = np.cumsum(quotients, dtype=np.int64)
    ends += np.arange(quotients.size, dtype=np.int64)
    bits = np.zeros(int(ends[-1]) + 1 if ends.size else 0, dtype=np.uint8)
    bits[ends] = 1
    return np.packbits(bits, bitorder="little")


def _unary_ends(block: Bytes, count: int, name: str) -> NDArray[np.int64]:
    """[count] positions of the one bits, which must be as many as there are indices and reach the last byte."""
    bits = np.unpackbits(block, bitorder="little")
    ones = int(np.count_nonzero(bits))
    if ones != count:
        raise FormatError(f"{name}: the support codes {ones} indices, but its header claims {count}")
    if block[-1] == 0:
        raise FormatError(f"{name}: the support is longer than its {count} indices need")
    return np.flatnonzero(bits).astype(np.int64, copy=False)


def _pack_low(gaps: NDArray[Any], parameter: int) -> Bytes:
    """The low bits of the gaps as bit planes."""
    planes = np.empty((parameter, gaps.size), dtype=np.uint8)
    for plane in range(parameter):
        planes[plane] = (gaps >> plane) & 1
    return np.packbits(planes.reshape(-1), bitorder="little")


def _unpack_low(block: Bytes, count: int, parameter: int, name: str) -> NDArray[np.int64]:
    """[count] low parts from their bit planes; what is left of the last byte must be zero."""
    bits = np.unpackbits(block, bitorder="little")
    if bits[count * parameter :].any():
        raise FormatError(f"{name}: the padding bits at the end of the support are not zero")
    low = np.zeros(count, dtype=np.int64)
    for plane in range(parameter):
        low |= bits[plane * count : (plane + 1) * count].astype(np.int64) << plane
    return low

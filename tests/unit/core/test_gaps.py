"""Gap coding: exact round trips, the size it promises, and files that lie."""

from __future__ import annotations

import struct
import time
from math import log2

import pytest
import torch

from peft_sparse.core.gaps import decode_gaps, encode_gaps, read_header
from peft_sparse.core.indices import index_dtype
from peft_sparse.errors import FormatError


def support(positions: list[int], numel: int) -> torch.Tensor:
    return torch.tensor(positions, dtype=index_dtype(numel))


def random_support(numel: int, density: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(numel, generator=generator) < density).nonzero().squeeze(1).to(index_dtype(numel))


def coded(
    shape: tuple[int, ...], count: int, *, parameter: int = 0, version: int = 1, payload: bytes = b""
) -> torch.Tensor:
    """Bytes written by hand from the table in the module's docstring."""
    words = (*shape, count)
    head = struct.pack("<BBB", version, parameter, len(shape)) + struct.pack(f"<{len(words)}Q", *words)
    return torch.tensor(list(head + payload), dtype=torch.uint8)


def test_bytes_are_those_of_the_format() -> None:
    # Gaps 3, 0, 9 with p = 1: quotients 1, 0, 4 and low bits 1, 0, 1.
    # Unary, first bit lowest: 01 1 00001 -> 0b10000110; low plane: 1 0 1 -> 0b101.
    expected = coded((4, 8), 3, parameter=1, payload=bytes([0b10000110, 0b101]))
    result = encode_gaps(support([3, 4, 14], 32), (4, 8))
    assert result.dtype == torch.uint8
    assert result.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("positions", "shape"),
    [
        ([0], ()),
        ([], ()),
        ([], (0,)),
        ([], (3, 0)),
        ([], (5,)),
        (list(range(17)), (17,)),
        ([16], (17,)),
        ([0, 16], (17,)),
        ([0, 1, 2, 2**20], (2**20 + 1,)),
        ([5, 2**31 - 2], (2**31 - 1,)),
    ],
)
def test_round_trip_of_edge_cases(positions: list[int], shape: tuple[int, ...]) -> None:
    numel = torch.Size(shape).numel()
    result = encode_gaps(support(positions, numel), shape)
    indices, found = decode_gaps(result, name="w", shape=shape, count=len(positions))
    assert indices.tolist() == positions
    assert indices.dtype == torch.int32
    assert found == shape


def test_indices_beyond_int32() -> None:
    positions = [0, 2**31 - 1, 2**31, 2**31 + 1, 2**32 + 12345, 2**33 - 1]
    indices, shape = decode_gaps(encode_gaps(support(positions, 2**33), (2**20, 2**13)), name="w")
    assert indices.dtype == torch.int64
    assert indices.tolist() == positions
    assert shape == (2**20, 2**13)


@pytest.mark.parametrize(("density", "limit"), [(0.001, 11.8), (0.01, 8.3), (0.1, 4.9), (0.5, 2.1), (1.0, 1.01)])
def test_size_is_near_the_entropy(density: float, limit: float) -> None:
    numel = 1_000_000
    indices = random_support(numel, density, seed=0)
    bits = 8 * encode_gaps(indices, (numel,)).numel() / indices.numel()
    entropy = 0.0 if density == 1.0 else (-density * log2(density) - (1 - density) * log2(1 - density)) / density
    assert entropy <= bits + 0.1, "fewer bits than the information that they carry"
    assert bits <= limit


def test_parameter_is_the_best_of_all() -> None:
    for seed, density in enumerate([0.0003, 0.004, 0.03, 0.2, 0.7]):
        indices = random_support(50_000, density, seed=seed)
        gaps = torch.diff(indices.long(), prepend=torch.tensor([-1])) - 1
        sizes = [indices.numel() * (p + 1) + int((gaps >> p).sum()) for p in range(20)]
        assert read_header(encode_gaps(indices, (50_000,)), name="w").parameter == sizes.index(min(sizes))


def test_header_tells_shape_and_count() -> None:
    header = read_header(encode_gaps(support([3, 4, 14], 32), (4, 8)), name="w")
    assert (header.shape, header.count, header.num_bytes) == ((4, 8), 3, 27)


def test_ten_million_indices_take_seconds() -> None:
    numel = 1_000_000_000
    draws = torch.randint(numel, (10_000_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    indices = torch.unique(draws)
    start = time.process_time()
    result = encode_gaps(indices, (numel,))
    again, _ = decode_gaps(result, name="w")
    elapsed = time.process_time() - start
    assert torch.equal(again, indices)
    assert result.numel() * 8 / indices.numel() <= 8.2
    assert elapsed < 10, f"{elapsed:.1f} s; about 1 s on a quiet core"


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        (torch.zeros(27, dtype=torch.int8), r"layer\.w: .*torch.uint8 tensor, got torch.int8"),
        (torch.zeros(3, 9, dtype=torch.uint8), r"layer\.w: .*shape \(3, 9\)"),
        (torch.zeros(27, dtype=torch.uint8, device="meta"), r"layer\.w: .*meta device"),
        (torch.zeros(0, dtype=torch.uint8), r"layer\.w: .*cut short, 0 bytes"),
        (torch.tensor([1, 0, 2, 9, 9], dtype=torch.uint8), r"layer\.w: .*cut short, 5 bytes"),
        (coded((4, 8), 3, parameter=1, version=2, payload=b"\x86\x05"), r"layer\.w: .*version 2.*reads version 1"),
        (coded((4, 8), 33, payload=bytes(20)), r"layer\.w: .*33 indices into 32 elements"),
        (coded((2**40, 2**40), 3, payload=b"\x07"), r"layer\.w: .*no tensor can have"),
        (coded((0, 2**62), 0), r"layer\.w: .*no tensor can have"),
        (coded((2**31, 2**20), 2**40, payload=b"\x07"), r"layer\.w: .*1 bytes follow the header.* need 137438953472"),
        (coded((4, 8), 3, parameter=1, payload=b"\x86"), r"layer\.w: .*(cut short|codes)"),
        (coded((4, 8), 3, parameter=1, payload=b"\x86\x05\x00"), r"layer\.w: .*header claims 3"),
        (coded((4, 8), 3, parameter=1, payload=b"\x86\x00\x05"), r"layer\.w: .*longer than its 3 indices need"),
        (coded((4, 8), 3, parameter=1, payload=b"\x86\x0d"), r"layer\.w: .*padding bits"),
        (coded((4, 8), 3, parameter=1, payload=b"\x06\x05"), r"layer\.w: .*codes 2 indices, but its header claims 3"),
        (coded((14,), 3, parameter=1, payload=b"\x86\x05"), r"layer\.w: .*outside \[0, 14\): 14"),
        (coded((9,), 3, parameter=1, payload=b"\x86\x05"), r"layer\.w: .*outside \[0, 9\)"),
        # The same support with p = 0 and with p = 2: 16 bits and 11 bits against 11 (p = 1 is the smaller of the best).
        (coded((4, 8), 3, payload=b"\x18\x40"), r"layer\.w: Rice parameter 0"),
        (coded((4, 8), 3, parameter=2, payload=b"\x13\x0d"), r"layer\.w: Rice parameter 2"),
        (coded((4, 8), 3, parameter=200, payload=bytes(100)), r"layer\.w: Rice parameter 200"),
        (coded((4, 8), 0, parameter=1), r"layer\.w: Rice parameter 1"),
        (coded((4, 8), 0, payload=b"\x00"), r"layer\.w: .*empty, but 1 bytes"),
    ],
)
def test_lies_are_refused_by_name(broken: torch.Tensor, match: str) -> None:
    with pytest.raises(FormatError, match=match):
        decode_gaps(broken, name="layer.w")


def test_an_index_that_wraps_around_int64_is_refused() -> None:
    # Quotient 65 at p = 58: 65 * 2**58 is 2**58 modulo 2**64, and with the low part 2**57 it would pass as an index.
    unary, low = bytes([0] * 8 + [0b10]), (2**57).to_bytes(8, "little")
    with pytest.raises(FormatError, match=r"w: an index lies outside \[0, 576460752303423488\)"):
        decode_gaps(coded((2**59,), 1, parameter=58, payload=unary + low), name="w")
    # With quotient 1 instead it is one.
    indices, _ = decode_gaps(coded((2**59,), 1, parameter=58, payload=bytes([0b10]) + low), name="w")
    assert indices.tolist() == [2**58 + 2**57]


def test_shape_and_count_must_match() -> None:
    good = encode_gaps(support([3, 4, 14], 32), (4, 8))
    with pytest.raises(FormatError, match=r"w: the support is for shape \(4, 8\), but the weight has shape \(8, 4\)"):
        decode_gaps(good, name="w", shape=(8, 4))
    with pytest.raises(FormatError, match=r"w: the support holds 3 indices, but 4 are expected"):
        decode_gaps(good, name="w", count=4)


def test_every_truncation_is_refused() -> None:
    good = encode_gaps(random_support(5_000, 0.02, seed=3), (50, 100))
    for length in range(good.numel()):
        with pytest.raises(FormatError):
            decode_gaps(good[:length], name="w")


@pytest.mark.parametrize(
    ("indices", "shape", "match"),
    [
        (torch.tensor([3, 3], dtype=torch.int32), (8,), "strictly ascending"),
        (torch.tensor([3, 8], dtype=torch.int32), (8,), r"lie in \[0, 8\)"),
        (torch.tensor([3], dtype=torch.int64), (8,), "must be torch.int32"),
        (torch.tensor([], dtype=torch.int64), (2**40, 2**20), r"fewer than 2\*\*60 elements"),
        (torch.tensor([], dtype=torch.int32), (-1,), r"sizes >= 0"),
    ],
)
def test_only_supports_are_encoded(indices: torch.Tensor, shape: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        encode_gaps(indices, shape)

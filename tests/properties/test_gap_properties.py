"""Gap coding for any support, and for any damage of one byte."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse.core.gaps import decode_gaps, encode_gaps
from peft_sparse.core.indices import check_indices, index_dtype
from peft_sparse.errors import FormatError
from tests.support.laws import examples


@st.composite
def supports(draw: st.DrawFn, max_numel: int = 3_000) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A support of any density in [0, 1] of a tensor with zero to three dimensions."""
    shape = tuple(draw(st.lists(st.integers(0, 14), max_size=3)))
    if draw(st.booleans()):
        shape = (draw(st.integers(0, max_numel)),)
    numel = torch.Size(shape).numel()
    density = draw(st.sampled_from([0.0, 0.002, 0.01, 0.1, 0.5, 0.95, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    chosen = torch.rand(numel, generator=generator) < density
    return chosen.nonzero().squeeze(1).to(index_dtype(numel)), shape


@examples(200)
@given(supports())
def test_round_trip(case: tuple[torch.Tensor, tuple[int, ...]]) -> None:
    indices, shape = case
    result, found = decode_gaps(encode_gaps(indices, shape), name="w", shape=shape, count=indices.numel())
    assert result.dtype == indices.dtype
    assert torch.equal(result, indices)
    assert found == shape


@examples(100)
@given(st.sets(st.integers(0, 2**40 - 1), max_size=30))
def test_round_trip_of_huge_tensors(chosen: set[int]) -> None:
    indices = torch.tensor(sorted(chosen), dtype=torch.int64)
    result, _ = decode_gaps(encode_gaps(indices, (2**20, 2**20)), name="w")
    assert torch.equal(result, indices)


@examples(60)
@given(supports(max_numel=400), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_another_support(case: tuple[torch.Tensor, tuple[int, ...]], flip: int) -> None:
    indices, shape = case
    good = encode_gaps(indices, shape)
    for position in range(good.numel()):
        damaged = good.clone()
        damaged[position] ^= flip
        try:
            result, found = decode_gaps(damaged, name="w")
        except FormatError:
            continue
        check_indices(result, torch.Size(found).numel(), name="w")
        # One encoding per support: what was accepted is what the encoder writes for it, so it is another support.
        assert torch.equal(encode_gaps(result, found), damaged)


@examples(200)
@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_refused_or_canonical(content: bytes) -> None:
    received = torch.tensor(list(content), dtype=torch.uint8)
    try:
        result, shape = decode_gaps(received, name="w")
    except FormatError:
        return
    assert torch.equal(encode_gaps(result, shape), received)

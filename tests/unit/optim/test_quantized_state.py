"""Optimizer state in bitsandbytes' 8 bits, and in its 32 bits."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_sparse.optim.quantized_state import dequantize, quantize
from peft_sparse.optim.reindex import GrownGradients, reindex
from peft_sparse.selection.replacement import Candidates, Replacement, drop_and_grow

bnb = pytest.importorskip("bitsandbytes")

K = 5000
GAMMA = 5


def book(signed: bool) -> Tensor:
    return bnb.functional.create_dynamic_map(signed=signed)


def numbers(signed: bool) -> Tensor:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) ** 3 * torch.logspace(-6, 2, 1000)
    return x if signed else x.abs()


@pytest.mark.parametrize("signed", [True, False])
def test_dequantize_is_bitsandbytes_own(signed: bool) -> None:
    quantized, state = bnb.functional.quantize_blockwise(numbers(signed), code=book(signed), blocksize=256)
    theirs = bnb.functional.dequantize_blockwise(quantized, state)
    assert torch.equal(dequantize(quantized, state.absmax, book(signed)), theirs)


@pytest.mark.parametrize("signed", [True, False])
def test_quantize_is_as_good_as_bitsandbytes_own(signed: bool) -> None:
    x = numbers(signed)
    quantized, state = bnb.functional.quantize_blockwise(x, code=book(signed), blocksize=256)
    codes, absmax = quantize(x, book(signed))
    assert codes.dtype == torch.uint8
    assert torch.equal(absmax, state.absmax)
    error = (dequantize(codes, absmax, book(signed)) - x).abs()
    theirs = (bnb.functional.dequantize_blockwise(quantized, state) - x).abs()
    smallest = book(False)[1] * absmax.repeat_interleave(256)[:1000]
    assert bool((error <= theirs + (0 if signed else smallest) + 1e-9).all())


def test_what_came_from_codes_goes_back_to_them() -> None:
    # The signed book has no -1, so there the largest magnitude of a block may shrink.
    codes, absmax = quantize(numbers(False), book(False))
    again, absmax_again = quantize(dequantize(codes, absmax, book(False)), book(False))
    assert torch.equal(codes, again)
    assert torch.equal(absmax, absmax_again)


def test_second_moments_are_never_rounded_to_zero() -> None:
    x = torch.tensor([1.0, 1e-12, 0.0])
    codes, absmax = quantize(x, book(False))
    back = dequantize(codes, absmax, book(False))
    assert back[1] > 0
    assert back[2] == 0


def test_zeros_stay_zeros() -> None:
    codes, absmax = quantize(torch.zeros(300), book(True))
    assert dequantize(codes, absmax, book(True)).tolist() == [0.0] * 300
    assert quantize(torch.empty(0), book(True))[0].shape == (0,)


def replacement(k: int) -> Replacement:
    old = torch.arange(0, 2 * k, 2, dtype=torch.int32)
    grown = Candidates(old[: k // 10] * 7 + 1, torch.ones(k // 10))
    return drop_and_grow(old, torch.rand(k, generator=torch.Generator().manual_seed(1)), grown, num_replaced=k // 10)


def trained(name: str, k: int, **arguments: Any) -> tuple[Any, nn.Parameter]:
    p = nn.Parameter(torch.zeros(k))
    optimizer = getattr(bnb.optim, name)([p], lr=0.01, **arguments)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        for step in range(7):
            p.grad = torch.randn(k, generator=torch.Generator().manual_seed(step)) + 0.5
            optimizer.step()
    return optimizer, p


def read(state: dict[str, Any], number: int) -> Tensor:
    stored = state[f"state{number}"]
    if stored.dtype != torch.uint8:
        return stored.clone()
    return dequantize(stored, state[f"absmax{number}"], state[f"qmap{number}"])


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "PagedAdamW8bit", "AdamW", "PagedAdamW"])
@pytest.mark.parametrize("k", [K, 1000])  # above and below min_8bit_size
def test_adam_is_carried_and_seeded(name: str, k: int) -> None:
    optimizer, p = trained(name, k, **({"weight_decay": 0.0} if "W" in name else {}))
    state = optimizer.state[p]
    is_quantized = "8bit" in name and k == K
    assert (state["state1"].dtype == torch.uint8) == is_quantized
    before = {number: read(state, number) for number in (1, 2)}
    r = replacement(k)
    n = r.num_grown
    assert n == k // 10
    reindex(optimizer, p, r, GrownGradients(torch.full((n,), 0.5), torch.full((n,), 0.25), GAMMA))
    stays = torch.ones(k, dtype=torch.bool)
    stays[r.grown] = False
    initial = {1: 0.5 * (1 - 0.9**7), 2: 0.25 * (1 - 0.999**7)}
    for number in (1, 2):
        after, expected = read(state, number), r.carry(before[number], initial[number])
        if not is_quantized:
            assert torch.equal(after[stays], expected[stays])
        error = (after - expected).abs()
        largest = (
            torch.nn.functional.pad(expected.abs(), (0, -k % 256)).view(-1, 256).amax(1).repeat_interleave(256)[:k]
        )
        # Half the widest gap of the code book.
        assert bool((error <= largest * (0.012 if is_quantized else 1e-7)).all())
    p.data.zero_()
    p.grad = torch.full((k,), 0.5)
    optimizer.step()
    # Constant gradients: steps of lr, up to the quantisation of both moments.
    assert p.detach()[r.grown].tolist() == pytest.approx([-0.01] * n, rel=0.12 if is_quantized else 1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "initial"),
    [
        ("Lion8bit", {}, 0.5),
        ("RMSprop8bit", {}, 0.3),
        ("Adagrad8bit", {}, 0.3 * GAMMA),
        ("SGD8bit", {"momentum": 0.9}, 0.0),
    ],
)
def test_optimizers_with_one_moment(name: str, arguments: dict[str, Any], initial: float) -> None:
    optimizer, p = trained(name, K, **arguments)
    r = replacement(K)
    expected = r.carry(read(optimizer.state[p], 1), initial)
    n = r.num_grown
    reindex(optimizer, p, r, GrownGradients(torch.full((n,), 0.5), torch.full((n,), 0.3), GAMMA))
    after = read(optimizer.state[p], 1)
    assert float((after - expected).abs().max()) <= 0.012 * float(expected.abs().max())
    assert after[r.grown].tolist() == pytest.approx([initial] * n, rel=0.06, abs=1e-6)


def test_sizes_may_change() -> None:
    optimizer, p = trained("AdamW8bit", K)
    old = torch.arange(0, 2 * K, 2, dtype=torch.int32)
    every = torch.arange(K)
    smaller = Replacement(every[:300], every[:0], every[:0], old[300:], every[300:], K)
    before = read(optimizer.state[p], 1)
    reindex(optimizer, p, smaller)
    state = optimizer.state[p]
    assert state["state1"].shape == (K - 300,)
    assert state["absmax1"].shape == (-(-(K - 300) // 256),)
    assert float((read(state, 1) - before[300:]).abs().max()) <= 0.012 * float(before.abs().max())
    p.data = smaller.carry(p)
    p.grad = torch.ones(K - 300)
    optimizer.step()
    assert bool(p.isfinite().all())

"""`lookup.embedding` against the dense float64 oracle, and bit for bit against the merged weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft_sparse.core import lookup
from peft_sparse.core.backends import reference
from peft_sparse.core.overlay import Overlay
from tests.numerics.test_ops import LargestOutput, saved_by
from tests.support.ops import compare, support

ROWS, WIDTH = 30, 8
SUPPORTS = {"one": (40,), "overlapping": (90, 150, 60), "empty": (0,), "empty and one": (0, 40), "full": (240,)}
IDS = torch.tensor([[3, 7, 3, 29], [0, 7, 12, 3]])


def make(
    counts, *, dtype=torch.float32, values_dtype=torch.float32, device="cpu"
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Weight, values, indices."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(ROWS, WIDTH, generator=generator).to(device, dtype)
    # A negative zero shows whether entries outside the supports are left alone.
    weight[3] = -0.0
    values = [torch.randn(k, generator=generator).to(device, values_dtype).requires_grad_() for k in counts]
    return weight, values, [support(ROWS * WIDTH, k, seed=i).to(device) for i, k in enumerate(counts)]


def run(compute, ids, weight, values, indices, output_grad, **options) -> dict[str, Tensor]:
    leaves = [value.detach().clone().requires_grad_() for value in values]
    output = compute(ids, weight, list(zip(leaves, indices, strict=True)), **options)
    output.backward(output_grad.to(output.dtype))
    return {"output": output.detach(), **{f"gradient of values {i}": leaf.grad for i, leaf in enumerate(leaves)}}


def check_embedding(
    counts, ids=IDS, *, dtype=torch.float32, values_dtype=torch.float32, device="cpu", **options
) -> None:
    weight, values, indices = make(counts, dtype=dtype, values_dtype=values_dtype, device=device)
    ids = ids.to(device)
    output_grad = torch.randn(*ids.shape, WIDTH, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    double = [value.double() for value in values]
    compare(
        run(lookup.embedding, ids, weight, values, indices, output_grad, **options),
        run(reference.embedding, ids, weight, values, indices, output_grad, **options),
        run(reference.embedding, ids, weight.double(), double, indices, output_grad, **options),
    )


@pytest.mark.parametrize("padding_idx", [None, 3, 5])
@pytest.mark.parametrize("counts", SUPPORTS.values(), ids=SUPPORTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_output_and_gradients(dtype, counts, padding_idx):
    values_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    check_embedding(counts, dtype=dtype, values_dtype=values_dtype, padding_idx=padding_idx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("counts", SUPPORTS.values(), ids=SUPPORTS)
def test_rows_are_the_merged_weights_bit_for_bit(counts, dtype):
    weight, values, indices = make(counts, dtype=dtype)
    merged = Overlay(indices).add(weight, values)
    found = lookup.embedding(IDS, weight, list(zip(values, indices, strict=True)))
    assert torch.equal(found, F.embedding(IDS, merged))
    assert torch.equal(found.signbit(), F.embedding(IDS, merged).signbit())


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor(7),
        torch.tensor([5]),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.tensor([3, 3, 3]),
        IDS.int(),
        IDS.t(),
        torch.arange(ROWS),
    ],
    ids=["scalar", "one", "empty", "empty batch", "repeated", "int32", "not contiguous", "all"],
)
def test_any_ids(ids):
    check_embedding((90, 40), ids)


def test_values_in_sixteen_bits():
    check_embedding((90, 40), dtype=torch.bfloat16, values_dtype=torch.bfloat16)


def test_many_repeats_are_summed_in_float32():
    # 3000 ones exceed what bfloat16 counts in steps of one, so a bfloat16 sum would stop at 256.
    weight, indices = torch.zeros(2, 2, dtype=torch.bfloat16), torch.tensor([1], dtype=torch.int32)
    values = torch.zeros(1, requires_grad=True)
    lookup.embedding(torch.zeros(3000, dtype=torch.int64), weight, [(values, indices)]).sum().backward()
    assert values.grad.tolist() == [3000.0]


def test_no_deltas_and_no_gradient():
    weight, values, indices = make((40,))
    assert torch.equal(lookup.embedding(IDS, weight, []), F.embedding(IDS, weight))
    with torch.no_grad():
        assert not lookup.embedding(IDS, weight, [(values[0], indices[0])]).requires_grad


def test_frozen_values_beside_trained_ones():
    weight, values, indices = make((90, 40))
    expected = run(lookup.embedding, IDS, weight, values, indices, torch.ones(2, 4, WIDTH))["gradient of values 1"]
    values[0].requires_grad_(False)
    lookup.embedding(IDS, weight, list(zip(values, indices, strict=True))).sum().backward()
    assert values[0].grad is None
    assert torch.equal(values[1].grad, expected)


def test_the_weight_gets_no_gradient():
    weight, values, indices = make((40,))
    weight.requires_grad_()
    lookup.embedding(IDS, weight, [(values[0], indices[0])]).sum().backward()
    assert weight.grad is None


def test_gradcheck():
    weight, values, indices = make((90, 40), dtype=torch.float64, values_dtype=torch.float64)

    def looked_up(*leaves: Tensor) -> Tensor:
        return lookup.embedding(IDS, weight, list(zip(leaves, indices, strict=True)), padding_idx=None)

    assert torch.autograd.gradcheck(looked_up, tuple(values))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    weight, values, indices = make((90, 40))
    deltas = list(zip(values, indices, strict=True))
    lookup.embedding(IDS, weight, deltas).square().sum().backward()
    expected = [value.grad for value in values]
    values_again = [value.detach().clone().requires_grad_() for value in values]
    again = list(zip(values_again, indices, strict=True))
    # Reentrant checkpointing wants an input that requires a gradient.
    trigger = torch.zeros(1, requires_grad=True)
    output = checkpoint(
        lambda _: lookup.embedding(IDS, weight, again).square().sum(), trigger, use_reentrant=use_reentrant
    )
    output.backward()
    assert all(torch.equal(a.grad, b) for a, b in zip(values_again, expected, strict=True))


def test_only_the_rows_of_the_batch_are_made():
    weight, values, indices = make((90, 40))
    deltas = list(zip(values, indices, strict=True))
    ids = torch.tensor([3, 7, 3])
    with LargestOutput() as largest:
        lookup.embedding(ids, weight, deltas).sum().backward()
    assert largest.numel < weight.numel() / 2
    saved = saved_by(lambda: lookup.embedding(ids, weight, deltas))
    assert max(tensor.numel() for tensor in saved) < weight.numel() / 2
    with LargestOutput() as largest:
        reference.embedding(ids, weight, deltas)
    assert largest.numel >= weight.numel()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_compiled(backend, padding_idx):
    torch._dynamo.reset()
    weight, values, indices = make((90, 40))

    def looked_up(ids, weight, deltas, *, padding_idx):
        return lookup.embedding(ids, weight, deltas, padding_idx=padding_idx)

    compiled = torch.compile(looked_up, backend=backend, fullgraph=True)
    output_grad = torch.randn(2, 4, WIDTH)
    found = run(compiled, IDS, weight, values, indices, output_grad, padding_idx=padding_idx)
    expected = run(lookup.embedding, IDS, weight, values, indices, output_grad, padding_idx=padding_idx)
    assert torch.equal(found["output"], expected["output"])
    assert torch.equal(found["output"].signbit(), expected["output"].signbit())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


def neighbouring_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = lookup._entries_of_rows
    monkeypatch.setattr(lookup, "_entries_of_rows", lambda indices, rows, width: entries(indices, rows - 1, width))


def last_entry_of_a_row_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = lookup._entries_of_rows
    monkeypatch.setattr(lookup, "_entries_of_rows", lambda *args: tuple(found[:-1] for found in entries(*args)))


def each_delta_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(self, originals, values):
        for slots, value in zip(self._slots or [slice(None)], values, strict=True):
            originals[slots] = (originals[slots].float() + value.detach()).to(originals.dtype)
        return originals

    monkeypatch.setattr(Overlay, "entries", rounded)


@pytest.mark.parametrize("plant", [neighbouring_rows, last_entry_of_a_row_lost])
def test_comparison_notices_a_planted_bug(plant, monkeypatch):
    check_embedding((90, 40))
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="relative error"):
        check_embedding((90, 40))


def test_bitwise_comparison_notices_a_rounding_too_many(monkeypatch):
    weight, values, indices = make((200, 200), dtype=torch.bfloat16)
    merged = Overlay(indices).add(weight, values)
    each_delta_rounded(monkeypatch)
    assert not torch.equal(lookup.embedding(IDS, weight, list(zip(values, indices, strict=True))), merged[IDS])


@pytest.mark.parametrize("token", [-1, -100, ROWS])
def test_an_id_that_is_no_row_is_refused_as_by_torch(token):
    weight, values, indices = make((40,))
    with pytest.raises(IndexError, match="out of range"):
        lookup.embedding(torch.tensor([3, token]), weight, list(zip(values, indices, strict=True)))

"""What `pytest -m gpu` runs on operations and layers: the oracles of the other tests, on an accelerator."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_sparse import RandConfig, resident
from peft_sparse.core.backends import sddmm
from peft_sparse.core.masked import MaskedPart, masked_linear
from peft_sparse.selection.top_k import top_k
from tests.numerics import test_entries, test_layers, test_lookup, test_products
from tests.numerics.test_entries import kernel  # noqa: F401 (a fixture)
from tests.support.gpu import DEVICE, MARKS, exact_float32  # noqa: F401 (a fixture of every test)
from tests.support.ops import check_linear, make_case, run, sparse_linear
from tests.support.oracle import relative_error

pytestmark = MARKS

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16, F64]


# ---- operations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(60,), (120, 200, 90), (0, 40), (480,)], ids=str)
@pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype, fan_in_fan_out, counts):
    values_dtype = F64 if dtype == F64 else F32
    check_linear(
        make_case(dtype=dtype, values_dtype=values_dtype, fan_in_fan_out=fan_in_fan_out, counts=counts, device=DEVICE)
    )


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_linear_with_values_in_sixteen_bits(dtype):
    check_linear(make_case(dtype=dtype, values_dtype=dtype, counts=(60, 30), device=DEVICE))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_linear_of_several_tiles(dtype, monkeypatch):
    monkeypatch.setattr("peft_sparse.core.backends.products.TILE_BYTES", 4 * 200 * 128)
    check_linear(
        make_case(leading=(700,), out_features=300, in_features=200, counts=(600, 900), dtype=dtype, device=DEVICE)
    )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit(use_reentrant):
    plain = run(make_case(dtype=BF16, device=DEVICE), sparse_linear)
    case = make_case(dtype=BF16, device=DEVICE)

    def call(own):
        return checkpoint(lambda x: sparse_linear(replace(own, x=x)), own.x, use_reentrant=use_reentrant)

    again = run(case, call)
    assert all(torch.equal(again[name], plain[name]) for name in plain)


@pytest.mark.parametrize("supports", test_products.SUPPORTS.values(), ids=test_products.SUPPORTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_of_a_product(dtype, supports):
    test_products.check_entries(supports, dtype=dtype, device=DEVICE)


def test_the_gradient_is_not_rounded_to_sixteen_bits():
    grad, x = (torch.randn(512, width).to(DEVICE, BF16) for width in (300, 200))
    support = torch.randperm(60000)[:600].sort().values.int().to(DEVICE)
    (found,) = sddmm.weight_gradients(grad, x, [support], (300, 200), sampled=False)
    exact = (grad.double().t() @ x.double()).view(-1)[support.long()]
    assert found.dtype == F32
    # Rounded to bfloat16 it would be 2e-3.
    assert relative_error(found, exact) < 2e-5


def test_no_gradient_of_the_weights_size_is_made():
    rows, columns, tokens = 8192, 8192, 16
    grad, x = (torch.randn(tokens, width).to(DEVICE, BF16) for width in (rows, columns))
    support = torch.arange(0, rows * columns, 997, dtype=torch.int32, device=DEVICE)
    sddmm.weight_gradients(grad, x, [support], (rows, columns), sampled=False)
    if DEVICE != "cuda":
        pytest.skip("the CPU's memory is not counted")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sddmm.weight_gradients(grad, x, [support], (rows, columns), sampled=False)
    # In float32 it would take four bytes an entry; a tile takes half of that.
    assert torch.cuda.max_memory_allocated() - before < 2.2 * rows * columns


@pytest.mark.skipif(DEVICE != "cuda", reason="the CPU's memory is not counted")
def test_outside_of_resident_mode_one_copy_of_a_weight_lives_at_a_time():
    width, num_layers = 4096, 6
    base = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(num_layers))).to(DEVICE, BF16)
    model = get_peft_model(base, RandConfig(density=0.001, target_modules=[str(n) for n in range(num_layers)]))
    x = torch.randn(16, width, device=DEVICE, dtype=BF16)
    model(x).square().mean().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(x).square().mean().backward()
    # Two bytes an entry is a copy of a weight, four a product in float32; six copies would be twelve.
    assert torch.cuda.max_memory_allocated() - before < 5 * width * width


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("counts", [(40,), (90, 150, 60), (240,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding(dtype, counts, padding_idx):
    values_dtype = F64 if dtype == F64 else F32
    test_lookup.check_embedding(counts, dtype=dtype, values_dtype=values_dtype, padding_idx=padding_idx, device=DEVICE)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("dtype", "values_dtype"), list(product(DTYPES, DTYPES)), ids=str)
def test_written_entries(kernel, dtype, values_dtype, in_place):  # noqa: F811
    test_entries.test_kernel_equals_its_twin_bit_for_bit(kernel, dtype, values_dtype, in_place)
    test_entries.test_twin_equals_overlay(dtype, values_dtype)


def test_special_written_entries(kernel):  # noqa: F811
    test_entries.test_special_values_are_written_as_the_twin_writes_them(kernel)


def test_entries_beyond_the_range_of_float16(kernel):  # noqa: F811
    test_entries.test_bfloat16_values_beyond_float16_are_added_before_they_are_rounded(kernel)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_masked_linear(dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, into = (torch.randn(*s, generator=generator) for s in ((9, 24), (16, 24), (9, 16)))
    scores, difference = torch.randn(2, 16, 24, generator=generator).unbind()
    found = {}
    for name, device, own in (("exact", "cpu", F64), ("own", DEVICE, dtype)):
        wide = F64 if own == F64 else F32
        leaves = [part.to(dtype).to(device, wide).requires_grad_() for part in (scores, difference)]
        y = masked_linear(
            x.to(dtype).to(device, own), weight.to(dtype).to(device, own), None, [MaskedPart(*leaves, 0.9, True)]
        )
        y.backward(into.to(dtype).to(device, own))
        found[name] = [y.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)]
    for own, exact in zip(found["own"], found["exact"], strict=True):
        assert relative_error(own, exact) < (1e-5 if dtype == F32 else 5e-3)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_selection_is_the_cpus(dtype):
    scores = torch.randn(70_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for k in (0, 1, 700, 69_999):
        assert torch.equal(top_k(scores.to(DEVICE), k, name="scores").cpu(), top_k(scores, k, name="scores"))


# ---- layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("kind", test_layers.LAYERS)
def test_layer(kind, dtype):
    base, model, x = test_layers.make(kind, dtype=dtype, device=DEVICE, adapters=("default", "b"))
    test_layers.assert_matches(base, model, x, ("default", "b"), dtype=dtype)


@pytest.mark.parametrize("kind", test_layers.LAYERS)
def test_resident_layer_and_its_weights_afterwards(kind):
    base, model, x = test_layers.make(kind, device=DEVICE, adapters=("default", "b"))

    def in_block(model, x):
        with resident(model):
            return test_layers.run(model, x)

    test_layers.assert_matches(base, model, x, ("default", "b"), mode=in_block)
    for name, parameter in base.named_parameters():
        module, _, part = name.rpartition(".")
        assert torch.equal(getattr(model.base_model.model.get_submodule(module).base_layer, part), parameter)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", test_layers.LAYERS)
def test_merging(kind, dtype):
    base, model, x = test_layers.make(kind, dtype=dtype, device=DEVICE, adapters=("default", "b"))
    with torch.no_grad():
        unmerged = model(x)
        model.merge_adapter()
        assert torch.equal(model(x), unmerged)
        model.unmerge_adapter()
        assert torch.equal(model(x), unmerged)
    for name, parameter in base.named_parameters():
        module, _, part = name.rpartition(".")
        assert torch.equal(getattr(model.base_model.model.get_submodule(module).base_layer, part), parameter)


@pytest.mark.parametrize("kind", ["linear", "gpt2 conv1d", "embedding", "llama norm"])
def test_compiled(kind):
    base, model, x = test_layers.make(kind, device=DEVICE)
    compiled = torch.compile(model, backend="inductor" if kind == "linear" and DEVICE == "cuda" else "aot_eager")
    test_layers.assert_matches(base, model, x, mode=lambda _, x: test_layers.run(compiled, x))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["nf4", "nf4, double", "nf4, bfloat16 model", "fp4", "8 bit, bfloat16 model"])
def test_quantised(kind):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises the weights of this test")
    from tests.numerics import test_quantized_layers as quantized

    adapters = ("default", "b")
    quantized.assert_matches(*quantized.make(kind, adapters=adapters, device=DEVICE), adapters)

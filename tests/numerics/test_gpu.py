"""What `pytest -m gpu` runs: the oracles of the other tests, on an accelerator.

Set PEFT_SPARSE_GPU_TESTS_ON=cpu to rehearse them where there is none.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from peft_sparse import (
    SM3,
    AdaSftConfig,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SparseAdamW,
    SpielAGConfig,
    SpielMAConfig,
    iter_deltas,
    resident,
    select_by_gradients,
    start_dense_phase,
    start_weight_phase,
)
from peft_sparse.core.backends import sddmm
from peft_sparse.core.masked import MaskedPart, masked_linear
from peft_sparse.selection.rows import num_rows, rows_of
from peft_sparse.selection.top_k import top_k
from tests.numerics import test_entries, test_layers, test_ops_embedding, test_products, test_spiel_loop
from tests.numerics.test_entries import kernel  # noqa: F401 (a fixture)
from tests.support.bottleneck import IDS as BOTTLENECK_IDS
from tests.support.bottleneck import Case as BottleneckCase
from tests.support.bottleneck import tensors_of
from tests.support.madg import MadGCase
from tests.support.ops import check_linear, make_case, run, sparse_linear
from tests.support.oracle import relative_error

DEVICE = os.environ.get("PEFT_SPARSE_GPU_TESTS_ON", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device is at hand"),
]

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16, F64]


@pytest.fixture(autouse=True)
def exact_float32():
    """Without TF32: the tolerances are float32's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


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
    test_ops_embedding.check_embedding(
        counts, dtype=dtype, values_dtype=values_dtype, padding_idx=padding_idx, device=DEVICE
    )


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
    import test_quantized_layers as quantized

    adapters = ("default", "b")
    quantized.assert_matches(*quantized.make(kind, adapters=adapters, device=DEVICE), adapters)


# ---- whole models ----------------------------------------------------------------------------------


def llama(dtype: torch.dtype = F32) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        eos_token_id=None,
        bos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype)


def ids(seed: int = 0, device: str = DEVICE) -> Tensor:
    return torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(seed)).to(device)


def loss_of(model: nn.Module, given: Tensor) -> Tensor:
    return model(input_ids=given, labels=given).loss


def trained(config, device: str, *, updates: int = 9, is_resident: bool = False, optimizer=SparseAdamW) -> PeftModel:
    """A tiny Llama in float64 after a few updates, which are the same on every device."""
    model = get_peft_model(llama().to(device), config).double().to(device)
    deltas = [delta for _, _, _, delta in iter_deltas(model)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = SM3(parameters, lr=0.05, deltas=deltas) if optimizer is SM3 else optimizer(parameters, lr=0.01)
    with resident(model) if is_resident else torch.enable_grad():
        for update in range(updates):
            loss_of(model, ids(update, device)).backward()
            steps.step()
            steps.zero_grad()
    return model


def assert_same(own: nn.Module, other: nn.Module) -> None:
    """The same support, and values that differ by what a Llama computes in float32 (its rotary embedding), and SpIEL
    (its estimates).
    """
    found = {name: delta for name, _, _, delta in iter_deltas(other)}
    for name, _, _, delta in iter_deltas(own):
        assert torch.equal(delta.indices.cpu(), found[name].indices.cpu()), name
        torch.testing.assert_close(delta.values.cpu(), found[name].values.cpu(), rtol=1e-4, atol=1e-7)


QUICK = {"reselection_steps": 4, "estimation_steps": 2, "total_steps": 12}
TRAININGS = {
    "rand": (RandConfig(density=0.05), torch.optim.AdamW),
    "rand, everything": (RandConfig(density=0.05, target_modules="all", budget="global"), SparseAdamW),
    "rand, rows": (RandConfig(density=0.05, support_rows=0.2), SparseAdamW),
    "ag": (SpielAGConfig(density=0.05, **QUICK), SparseAdamW),
    "ag, rows": (SpielAGConfig(density=0.05, support_rows=0.2, **QUICK), SparseAdamW),
    "ma": (SpielMAConfig(density=0.05, **QUICK), SM3),
}


@pytest.mark.parametrize("is_resident", [False, True])
@pytest.mark.parametrize("name", TRAININGS)
def test_training_is_the_cpus(name, is_resident):
    config, optimizer = TRAININGS[name]
    own = trained(config, DEVICE, is_resident=is_resident, optimizer=optimizer)
    assert_same(own, trained(config, "cpu", optimizer=optimizer))
    if config.support_rows is not None:
        for _, _, _, delta in iter_deltas(own):
            assert rows_of(delta.indices, delta.shape).numel() <= num_rows(config.support_rows, delta.shape)


@pytest.mark.parametrize("mode", ["plain", "resident", "checkpointing"])
@pytest.mark.parametrize("method", ["ag", "ma"])
def test_spiel_equals_its_reference(method, mode):
    test_spiel_loop.run(method, accumulate=2, clip=0.5, mode=mode, device=DEVICE)


@pytest.mark.parametrize("share", [None, 0.25])
@pytest.mark.parametrize("criterion", ["fisher", "weight_times_gradient", "largest_weight"])
def test_one_shot_selection_is_the_cpus(criterion, share):
    models = []
    for device in (DEVICE, "cpu"):
        config = OneShotConfig(density=0.05, criterion=criterion, selection_batches=2, support_rows=share)
        model = get_peft_model(llama().double().to(device), config)
        if criterion != "largest_weight":
            select_by_gradients(model, [{"input_ids": ids(n, device), "labels": ids(n, device)} for n in range(2)])
        models.append(model)
    assert_same(*models)


def test_a_dense_phase_is_the_cpus():
    models = []
    for device in (DEVICE, "cpu"):
        model = get_peft_model(llama().double().to(device), LotteryTicketConfig(density=0.05, support_rows=0.5))
        phase = start_dense_phase(model)
        steps = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for update in range(2):
            loss_of(model, ids(update, device)).backward()
            steps.step()
            steps.zero_grad()
        phase.start_sparse_phase()
        models.append(model)
    assert_same(*models)


def test_ada_sft_is_the_cpus():
    losses = []
    for device in (DEVICE, "cpu"):
        model = get_peft_model(llama().double().to(device), AdaSftConfig(target_modules="all-linear")).double()
        found = []
        for phase in range(2):
            if phase:
                start_weight_phase(model)
                model.double()
            steps = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
            for _ in range(3):
                loss = loss_of(model, ids(0, device))
                loss.backward()
                steps.step()
                steps.zero_grad()
                found.append(float(loss))
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("request_name", ["pfeiffer with nice", "houlsby", "parallel"])
def test_bottleneck_adapters_equal_the_formulas(request_name):
    case = BottleneckCase(request_name)
    model = case.model()
    expected = case.expected(tensors_of(model, "default"))
    found = model.to(DEVICE)(input_ids=BOTTLENECK_IDS.to(DEVICE)).logits
    # A Llama's rotary embedding is float32.
    exact = {"rtol": 1e-9, "atol": 1e-12} if case.kind != "llama" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.detach().cpu(), expected.detach(), **exact)


@pytest.mark.parametrize("request_name", ["MAD-G", "MAD-G-LS"])
def test_generated_adapters_equal_the_formulas(request_name):
    case = MadGCase(request_name)
    model = case.model()
    expected = case.expected(model, "quy")
    model = model.to(DEVICE).train()
    with model.set_language("quy"):
        found = model(input_ids=BOTTLENECK_IDS.to(DEVICE)).logits
        found.square().sum().backward()
    torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=1e-9, atol=1e-12)
    adapter = model.generate_adapter("quy")
    plain = adapter.add_to(case.base().to(DEVICE)).to(DEVICE).eval()
    torch.testing.assert_close(
        plain(input_ids=BOTTLENECK_IDS.to(DEVICE)).logits.detach().cpu(), expected.detach(), rtol=1e-4, atol=1e-5
    )


def moved(model: PeftModel) -> PeftModel:
    for _, _, _, delta in iter_deltas(model):
        delta.values.data.normal_(std=0.1)
    return model


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_generation_unmerged_resident_and_merged_are_one(dtype):
    model = moved(get_peft_model(llama(dtype).to(DEVICE), RandConfig(density=0.2))).eval()
    before = copy.deepcopy(model.get_base_model().state_dict())
    given = {"input_ids": ids()[:, :5], "attention_mask": torch.ones_like(ids()[:, :5]), "max_new_tokens": 8}
    unmerged = model.generate(**given, do_sample=False)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**given, do_sample=False), unmerged)
    with resident(model):
        assert torch.equal(model.generate(**given, do_sample=False), unmerged)
    after = model.get_base_model().state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(model.merge_and_unload().generate(**given, do_sample=False), unmerged)


def test_saved_there_and_loaded_here(tmp_path):
    model = moved(get_peft_model(llama().to(DEVICE), RandConfig(density=0.1))).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert_same(model, loaded)
    again = PeftModel.from_pretrained(llama().to(DEVICE), tmp_path).eval()
    assert all(delta.indices.device.type == DEVICE for _, _, _, delta in iter_deltas(again))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids()).logits, again(input_ids=ids()).logits)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_autocast_is_as_close_to_float64_as_a_dense_model(dtype):
    torch.manual_seed(1)
    model = get_peft_model(llama(), RandConfig(density=0.1, init_weights=False))
    dense = copy.deepcopy(model).merge_and_unload().requires_grad_()
    exact = copy.deepcopy(dense).double()
    for own in (model.to(DEVICE), dense.to(DEVICE)):
        with torch.autocast(DEVICE, dtype=dtype):
            loss = loss_of(own, ids())
        loss.backward()
    loss_of(exact, ids(device="cpu")).backward()
    for name, _, _, delta in iter_deltas(model):
        support = delta.indices.cpu().long()
        expected, plain = (twin.get_parameter(name).grad.cpu().view(-1)[support] for twin in (exact, dense))
        found = delta.values.grad.cpu()
        assert relative_error(found, expected) < 2 * relative_error(plain, expected) + 1e-3, name


@pytest.mark.parametrize(("method", "optimizer"), [("rand", "adamw"), ("ag", "sparse_adamw"), ("ma", "sm3")])
def test_fsdp2_on_one_device(method, optimizer, tmp_path, monkeypatch):
    from tests.support.distributed import training as training_cases

    monkeypatch.setattr(training_cases, "make_bert", lambda **fields: make_on_device(training_cases, fields))
    batch = training_cases.batch
    monkeypatch.setattr(
        training_cases, "batch", lambda *args, **fields: {k: t.to(DEVICE) for k, t in batch(*args, **fields).items()}
    )
    alone = training_cases.train_fsdp(method, optimizer)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = training_cases.train_fsdp(method, optimizer)
    finally:
        dist.destroy_process_group()
    assert sharded.keys() == alone.keys()
    for key, expected in alone.items():
        if isinstance(expected, Tensor):
            torch.testing.assert_close(sharded[key].cpu(), expected.cpu(), rtol=1e-6, atol=1e-9, msg=key)


def make_on_device(cases, fields):
    from tests.support import training as tiny_training

    return tiny_training.make_bert(**fields).to(DEVICE)

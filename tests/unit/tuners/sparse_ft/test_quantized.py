"""Sparse adapters on quantised models: every verb, merging with and without loss, and what is refused."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from peft import PeftModel, get_layer_status, get_model_status, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from peft_sparse import (
    ConfigError,
    LotteryTicketConfig,
    RandConfig,
    SpielAGConfig,
    SpielMAConfig,
    iter_deltas,
    start_dense_phase,
)
from peft_sparse.tuners.common import packed
from peft_sparse.tuners.common.targets import model_numel
from peft_sparse.tuners.sparse_ft.layers.quantized import QuantizedLinear

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises the models of these tests")
pytest.importorskip("accelerate", reason="transformers loads quantised models with accelerate")

from tests.support.quantized import (  # noqa: E402
    BF16,
    F32,
    IDS,
    LINEARS,
    QUANTIZED,
    assert_same_bytes,
    dense,
    load,
    logits,
    packed_bytes,
    plain,
    request_for,
    shrink,
    tuned,
    twin,
)

kinds = pytest.mark.parametrize("kind", QUANTIZED)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def q_proj(model):
    return next(m for n, m in model.named_modules() if n.endswith("q_proj"))


# ---- how many, which -----------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize(
    "request_",
    [
        {"density": 0.1},
        {"density": 0.01, "density_of": "model"},
        {"density": None, "equivalent_rank": 2},
        {"density": None, "num_weights": 1234},
        {"density": 0.1, "budget": "global"},
        {"density": 0.05, "target_modules": None},
        {"density": 0.1, "target_modules": None, "target_parameters": ["q_proj.weight"]},
        {"density": 0.05, "target_modules": "all"},
    ],
)
def test_the_same_weights_as_on_the_unquantised_model(kind, request_):
    config = request_for(init_weights=True, **request_)
    model, ordinary = get_peft_model(load(kind), config), get_peft_model(plain(), config)
    assert model.peft_config["default"].counts == ordinary.peft_config["default"].counts
    assert model_numel(model) == model_numel(ordinary) == sum(p.numel() for p in plain().parameters())
    expected = {name: delta for name, _, _, delta in iter_deltas(ordinary)}
    for name, _, _, delta in iter_deltas(model):
        assert delta.shape == expected[name].shape
        assert torch.equal(delta.indices, expected[name].indices)


@kinds
def test_peft_sees_the_backend(kind):
    model = tuned(load(kind))
    name = "bnb 8bit" if kind == "8 bit" else "bnb 4bit"
    assert all(status.quantization_backend == name for status in get_layer_status(model))
    assert get_model_status(model).quantization_backend == name
    assert isinstance(q_proj(model), QuantizedLinear)
    assert f"quantization_backend='{name}'" in repr(q_proj(model))
    assert (q_proj(model).in_features, q_proj(model).out_features) == (64, 64)
    assert q_proj(model).get_delta_weight("default").shape == (64, 64)


# ---- verbs ---------------------------------------------------------------------------------------


def start(kind, folder):
    """A fresh adapter is the identity; 4-bit layers dequantise in one way only."""
    for dtype in (F32, BF16):
        base = load(kind, dtype=dtype, compute=dtype)
        own = logits(base)
        fresh = logits(tuned(base, init_weights=True))
        if kind == "8 bit":
            assert float((fresh - own).norm() / own.norm()) < 4 * torch.finfo(dtype).eps
        else:
            assert torch.equal(fresh, own)


def train(kind, folder):
    model = tuned(load(kind), init_weights=True)
    before = packed_bytes(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.02
    assert_same_bytes(packed_bytes(model), before)
    assert all(delta.values.dtype == F32 for _, _, _, delta in iter_deltas(model))
    close(logits(model), logits(twin(model, dense(model))))


def reselect(kind, folder):
    """SpIEL sees the gradient of a quantised weight as it sees that of the ordinary one."""
    request = {"density": 0.05, "target_modules": LINEARS, "reselection_steps": 4, "estimation_steps": 2}
    for make in (SpielAGConfig, SpielMAConfig):
        model = get_peft_model(load(kind), make(**request, total_steps=8))
        ordinary = get_peft_model(twin(model), make(**request, total_steps=8))
        before = [delta.indices.clone() for _, _, _, delta in iter_deltas(model)]
        for one in (model, ordinary):
            optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
            for _ in range(8):
                one(input_ids=IDS, labels=IDS).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        pairs = zip(iter_deltas(model), iter_deltas(ordinary), before, strict=True)
        for (name, _, _, delta), (_, _, _, expected), old in pairs:
            assert not torch.equal(delta.indices, old), name
            same = torch.isin(delta.indices, expected.indices)
            assert float(same.float().mean()) > 0.9, name


def save_and_reload(kind, folder):
    model = tuned(load(kind))
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(load(kind), folder).train()
    assert torch.equal(logits(again), logits(model))
    lean = PeftModel.from_pretrained(load(kind), folder, low_cpu_mem_usage=True).train()
    assert torch.equal(logits(lean), logits(model))
    by_transformers = load(kind)
    by_transformers.load_adapter(str(folder))
    assert torch.equal(logits(by_transformers.train()), logits(model))
    ordinary = tuned(plain())
    for (_, _, _, one), (_, _, _, other) in zip(iter_deltas(ordinary), iter_deltas(model), strict=True):
        one.set_support(other.indices, other.values)
    ordinary.save_pretrained(folder / "ordinary")
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (folder / "ordinary" / weights).read_bytes()
    # What was trained on a quantised model serves the unquantised one.
    moved = PeftModel.from_pretrained(plain(), folder)
    for name, _, _, delta in iter_deltas(moved):
        assert torch.equal(delta.delta.to_dense(), dense(model)[name])


def disable(kind, folder):
    base = load(kind)
    own = logits(base)
    model = tuned(base)
    before = logits(model)
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(logits(model), own)
        assert torch.equal(logits(model), before)
    assert not torch.equal(before, own)


def switch_and_add_up(kind, folder):
    model = tuned(load(kind), "x", "b")
    a, b = dense(model, "x"), dense(model, "b")
    close(logits(model), logits(twin(model, a)))
    model.set_adapter("b")
    close(logits(model), logits(twin(model, b)))
    model.base_model.set_adapter(["b", "x"])
    close(logits(model), logits(twin(model, a, b)))


def compose(kind, folder):
    model = tuned(load(kind), "x", "b")
    model.base_model.add_weighted_adapter(["x", "b"], [0.5, -1.0], "both")
    model.set_adapter("both")
    expected = {name: 0.5 * tensor - dense(model, "b")[name] for name, tensor in dense(model, "x").items()}
    close(logits(model), logits(twin(model, expected)))


def delete(kind, folder):
    model = tuned(load(kind), "x", "b")
    a = dense(model, "x")
    model.delete_adapter("b")
    close(logits(model), logits(twin(model, a)))
    assert list(model.peft_config) == ["x"]


def frozen_beside_training(kind, folder):
    model = tuned(load(kind), "language", "task")
    model.base_model.set_adapter(["language", "task"])
    model.set_requires_grad("language", requires_grad=False)
    model(input_ids=IDS, labels=IDS).loss.backward()
    ordinary = twin(model, dense(model, "language"), dense(model, "task"))
    ordinary(input_ids=IDS, labels=IDS).loss.backward()
    assert all(delta.values.grad is None for _, _, _, delta in iter_deltas(model, "language"))
    for name, _, _, delta in iter_deltas(model, "task"):
        expected = ordinary.get_parameter(name).grad.view(-1)[delta.indices.long()]
        torch.testing.assert_close(delta.values.grad, expected, rtol=2e-3, atol=1e-7)


def copies(kind, folder):
    model = tuned(load(kind))
    before = logits(model)
    twin_ = copy.deepcopy(model)
    shrink(twin_, factor=0.0)
    assert torch.equal(logits(model), before)
    close(logits(twin_), logits(twin(model)))


def prepared(kind, folder):
    base = prepare_model_for_kbit_training(load(kind, dtype=BF16, compute=BF16), use_gradient_checkpointing=True)
    model = tuned(base)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert loss.dtype == F32
    for _, _, _, delta in iter_deltas(model):
        assert torch.isfinite(delta.values.grad).all()
        assert float(delta.values.grad.abs().max()) > 0
    close_to = logits(twin(model, dense(model)))
    assert float((logits(model) - close_to).norm() / close_to.norm()) < 0.02


def unload(kind, folder):
    base = load(kind)
    own, before = logits(base), packed_bytes(base)
    back = tuned(base).base_model.unload()
    assert torch.equal(logits(back), own)
    assert_same_bytes(packed_bytes(back), before)
    for module in back.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            from bitsandbytes.functional import has_avx512bf16

            assert module.support_avx512bf16_for_cpu == has_avx512bf16()


VERBS = [
    start,
    train,
    reselect,
    save_and_reload,
    disable,
    switch_and_add_up,
    compose,
    delete,
    frozen_beside_training,
    copies,
    prepared,
    unload,
]


@kinds
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_verb(verb, kind, tmp_path):
    verb(kind, tmp_path)


# ---- merging with loss ---------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_unmerging_restores_every_byte(kind, used, safe):
    """An 8-bit layer keeps its scales elsewhere once it was used."""
    model = tuned(load(kind), "x", "b", target_modules=["q_proj", "down_proj"])
    if used:
        with model.disable_adapter():
            logits(model)
    before, outputs = packed_bytes(model), logits(model)
    bookkeeping = {n: dict(vars(p)) for n, p in model.named_parameters() if "base_layer.weight" in n}
    for adapters in (["x"], ["x", "b"]):
        with pytest.warns(UserWarning, match="Merging into quantised weights"):
            model.merge_adapter(adapters, safe_merge=safe)
        merged = logits(model)
        assert not torch.equal(merged, outputs)
        assert not torch.equal(q_proj(model).get_base_layer().weight, before[_of_q(before)])
        model.unmerge_adapter()
        assert_same_bytes(packed_bytes(model), before)
        assert torch.equal(logits(model), outputs)
        assert all(layer.merge_error is None for layer in model.modules() if isinstance(layer, QuantizedLinear))
    for name, parameter in model.named_parameters():
        if name in bookkeeping:
            assert vars(parameter).keys() == bookkeeping[name].keys()
            for key in ("bnb_quantized", "quant_state", "has_fp16_weights"):
                assert vars(parameter).get(key) is bookkeeping[name].get(key), (name, key)


def _of_q(found):
    return next(name for name in found if name.endswith("q_proj.codes"))


@kinds
def test_merging_one_adapter_after_the_other_quantises_the_sum_once(kind):
    one, other = (tuned(load(kind), "x", "b") for _ in range(2))
    before = packed_bytes(one)
    with pytest.warns(UserWarning, match="Merging into quantised weights"):
        one.merge_adapter(["x"])
    with pytest.warns(UserWarning, match="Merging into quantised weights"):
        one.merge_adapter(["b"])
    with pytest.warns(UserWarning, match="Merging into quantised weights"):
        other.merge_adapter(["x", "b"])
    assert_same_bytes(packed_bytes(one), packed_bytes(other))
    one.unmerge_adapter()
    assert_same_bytes(packed_bytes(one), before)


def test_unmerging_restores_what_a_layer_of_bitsandbytes_own_making_holds_twice():
    """Where the layer was not made by transformers, it keeps its quantisation state beside the weight, for FSDP."""
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
    state = layer.quant_state
    assert state is layer.weight.quant_state
    model = adapt(layer)
    with pytest.warns(UserWarning, match="Merging into quantised weights"):
        model.merge_adapter()
    assert layer.quant_state is not state
    model.unmerge_adapter()
    assert layer.quant_state is layer.weight.quant_state is state


def test_disabling_a_merged_adapter_unmerges_bit_for_bit():
    model = tuned(load("nf4, double"))
    before, own = packed_bytes(model), logits(load("nf4, double"))
    with pytest.warns(UserWarning, match="Merging into quantised weights"):
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), own)
    assert_same_bytes(packed_bytes(model), before)


@kinds
def test_the_warning_says_what_was_lost(kind):
    model = tuned(load(kind))
    with pytest.warns(UserWarning, match="Merging into") as caught:
        model.merge_adapter()
    (text,) = [str(w.message) for w in caught if "quantised" in str(w.message)]
    assert "In 7 layers" in text
    assert "unmerge_adapter() gives the old ones back bit for bit" in text
    assert "merge_and_unload(dequantize=True) merges without loss" in text
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    total = sum((layer.merge_error for layer in layers[1:]), layers[0].merge_error)
    shown = [float(number) for number in re.findall(r"([\d.]+)%", text)][:3]
    assert shown == pytest.approx([100 * part for part in (total.tuned, total.of_delta, total.whole)], abs=0.51)
    assert shown[::2] == pytest.approx([100 * total.tuned, 100 * total.whole], abs=0.006)
    low, high = (0.001, 0.03) if kind == "8 bit" else (0.02, 0.3)
    assert low < total.tuned < high
    assert low < total.whole < high


@kinds
def test_merge_and_unload_warns_and_gives_a_quantised_model(kind, tmp_path):
    model = tuned(load(kind))
    with pytest.warns(UserWarning, match="Merging into quantised weights") as caught:
        merged = model.merge_and_unload()
    assert len([w for w in caught if "quantised" in str(w.message)]) == 1
    assert not any(isinstance(m, QuantizedLinear) for m in merged.modules())
    assert packed.find_backend(q_proj(merged)) is not None
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    close(logits(again), logits(merged))


def test_nothing_is_said_and_nothing_quantised_where_there_is_no_delta():
    model = get_peft_model(load("nf4"), LotteryTicketConfig(density=0.1, target_modules=LINEARS))
    before = packed_bytes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
    assert_same_bytes(packed_bytes(model), before)


@kinds
def test_safe_merge_refuses_values_that_are_not_finite(kind):
    model = tuned(load(kind))
    before = packed_bytes(model)
    q_proj(model).sparse_ft_weight["default"].values.data[3] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert_same_bytes(packed_bytes(model), before)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True, dequantize=True)
    assert_same_bytes(packed_bytes(model), before)


def test_safe_merge_refuses_what_cannot_be_quantised():
    """8-bit weights are rounded to float16 on the way."""
    model = tuned(load("8 bit"), target_modules=["q_proj"])
    before, outputs = packed_bytes(model), logits(model)
    q_proj(model).sparse_ft_weight["default"].values.data[3] = 1e6
    with pytest.raises(ValueError, match="leaves the range that bnb 8bit can quantise"):
        model.merge_adapter(safe_merge=True)
    assert_same_bytes(packed_bytes(model), before)
    assert not model.base_model.model.model.layers[0].self_attn.q_proj.merged
    q_proj(model).sparse_ft_weight["default"].values.data[3] = 0.0
    assert outputs.shape == logits(model).shape


def test_a_copy_of_a_merged_model_unmerges_on_its_own():
    model = tuned(load("nf4, double"))
    before, outputs = packed_bytes(model), logits(model)
    with pytest.warns(UserWarning, match="Merging into quantised weights"):
        model.merge_adapter()
    merged, other = packed_bytes(model), copy.deepcopy(model)
    other.unmerge_adapter()
    assert_same_bytes(packed_bytes(other), before)
    assert torch.equal(logits(other), outputs)
    assert_same_bytes(packed_bytes(model), merged)


# ---- merging without loss ------------------------------------------------------------------------


def assert_ordinary(model):
    for module in model.modules():
        assert not isinstance(module, QuantizedLinear)
        assert packed.find_backend(module) is None
    for mark in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        assert not hasattr(model, mark) or getattr(model, mark) is None
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    assert len({p.dtype for p in model.parameters()}) == 1
    assert "quantization" not in model.config.to_json_string()


@kinds
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_dequantising_merges_bit_for_bit(kind, dtype, tmp_path):
    model = tuned(load(kind, dtype=dtype, compute=dtype), "x", "b", target_biases=True)
    model.base_model.set_adapter(["x", "b"])
    before = logits(model)
    weight = q_proj(model).make_weight(["x", "b"], dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload(dequantize=True)
    assert_ordinary(merged)
    assert type(q_proj(merged)) is nn.Linear
    assert torch.equal(q_proj(merged).weight, weight)
    assert merged.dtype == dtype
    assert torch.equal(logits(merged), before)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert_ordinary(again)
    assert again.dtype == dtype
    assert torch.equal(logits(again), before)
    # An ordinary model in every way: it casts, and takes adapters and a dense phase.
    again.half().float()
    start_dense_phase(get_peft_model(again, LotteryTicketConfig(density=0.1, target_modules=LINEARS))).abort()


@kinds
def test_what_is_not_targeted_is_dequantised_too(kind, tmp_path):
    model = tuned(load(kind), target_modules=["q_proj", "down_proj"])
    before = logits(model)
    merged = model.merge_and_unload(dequantize=True)
    assert_ordinary(merged)
    if kind == "8 bit":
        # bitsandbytes multiplies codes by scale / 127 in another order.
        torch.testing.assert_close(logits(merged), before, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(logits(merged), before)


@kinds
def test_dequantising_a_model_that_was_saved_quantised(kind, tmp_path):
    load(kind).save_pretrained(tmp_path / "quantised")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised").train()
    assert packed.find_backend(q_proj(base)) is not None
    model = tuned(base)
    before = logits(model)
    merged = model.merge_and_unload(dequantize=True)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").train()
    assert_ordinary(again)
    assert torch.equal(logits(again), before)


def test_dequantising_after_merging_starts_from_the_packed_weight():
    model = tuned(load("nf4"), "x", "b")
    model.base_model.set_adapter(["x", "b"])
    before = logits(model)
    with pytest.warns(UserWarning, match="Merging into quantised weights"):
        model.merge_adapter(["x"])
    assert not torch.equal(logits(model), before)
    with pytest.warns(UserWarning, match="Already following adapters were merged x"):
        merged = model.merge_and_unload(dequantize=True)
    assert torch.equal(logits(merged), before)


def test_chosen_adapters_are_dequantised():
    model = tuned(load("nf4"), "x", "b")
    model.set_adapter("b")
    before = logits(model)
    model.set_adapter("x")
    assert torch.equal(logits(model.merge_and_unload(adapter_names=["b"], dequantize=True)), before)


@pytest.mark.parametrize(
    ("dtype", "compute", "prepare"), [(BF16, F32, False), (F32, BF16, False), (BF16, BF16, True), (BF16, F32, True)]
)
def test_a_model_of_several_dtypes_goes_to_one_that_holds_all_weights(dtype, compute, prepare):
    base = load("nf4", dtype=dtype, compute=compute)
    if prepare:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = tuned(base)
    weight, before = q_proj(model).make_weight(["default"], dtype=compute), logits(model)
    merged = model.merge_and_unload(dequantize=True)
    assert_ordinary(merged)
    assert merged.dtype == F32
    assert torch.equal(q_proj(merged).weight, weight.float())
    # The layers no longer round what they are given, or give.
    assert float((logits(merged) - before.float()).norm() / before.float().norm()) < 0.02


def test_dequantising_an_unquantised_model_is_merging():
    model = tuned(plain())
    before = logits(model)
    merged = model.merge_and_unload(dequantize=True)
    assert torch.equal(logits(merged), before)
    model = tuned(plain())
    expected = model.merge_and_unload()
    for (name, one), other in zip(merged.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other), name


@kinds
def test_conv1d_keeps_its_orientation(kind, tmp_path):
    """transformers quantises the transpose of GPT-2's weights; an adapter fits the model quantised or not."""
    targets = {"target_modules": ["c_attn", "c_fc", "c_proj"], "target_biases": True}
    model = tuned(load(kind, model="gpt2"), **targets)
    ordinary = tuned(plain(model="gpt2"), **targets)
    shapes = {name: delta.shape for name, _, _, delta in iter_deltas(model)}
    assert shapes == {name: delta.shape for name, _, _, delta in iter_deltas(ordinary)}
    before = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="Merging into quantised weights"):
        model.merge_adapter()
    error = next(layer.merge_error for layer in model.modules() if isinstance(layer, QuantizedLinear))
    assert 0 < error.tuned < 0.3
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    merged = model.merge_and_unload(dequantize=True)
    assert_ordinary(merged)
    assert isinstance(merged.transformer.h[0].attn.c_attn, Conv1D)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").train()
    assert torch.equal(logits(again), logits(merged))
    moved = PeftModel.from_pretrained(plain(model="gpt2"), tmp_path / "adapter")
    assert {n: d.shape for n, _, _, d in iter_deltas(moved)} == shapes


def test_hooks_of_accelerate_move_over():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    base = load("nf4")
    add_hook_to_module(q_proj(base), AlignDevicesHook(execution_device="cpu"))
    model = tuned(base)
    before = logits(model)
    merged = model.merge_and_unload(dequantize=True)
    assert isinstance(q_proj(merged)._hf_hook, AlignDevicesHook)
    assert torch.equal(logits(merged), before)


# ---- what is refused -----------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def adapt(layer):
    return get_peft_model(Holder(layer), RandConfig(density=0.1, target_modules=["layer"], init_weights=False))


def test_8_bit_products_over_16_bit_weights():
    with pytest.raises(ConfigError, match=r"layer has 8-bit products .* llm_int8_has_fp16_weight=False"):
        adapt(bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=True))


@pytest.mark.parametrize("make", [bnb.nn.Embedding4bit, bnb.nn.Embedding8bit])
def test_quantised_embeddings(make):
    with pytest.raises(ConfigError, match=r"target module layer of type Embedding.bit is not supported"):
        adapt(make(64, 64).to("cpu"))


@pytest.mark.parametrize("make", [bnb.nn.Linear4bit, bnb.nn.Linear8bitLt])
def test_a_weight_that_is_not_quantised_yet(make):
    arguments = {} if make is bnb.nn.Linear4bit else {"has_fp16_weights": False}
    layer = make(64, 32, **arguments)
    with pytest.raises(ConfigError, match=r"is not quantised yet.*model.to\(\"cuda\"\)"):
        packed.dequantize(layer, packed.find_backend(layer))
    model = adapt(layer)
    (shape,) = [delta.shape for name, _, _, delta in iter_deltas(model) if name.endswith("weight")]
    assert shape == (32, 64)
    assert model.to("cpu")(torch.randn(2, 64)).shape == (2, 32)


def test_a_dense_phase():
    model = get_peft_model(load("nf4"), LotteryTicketConfig(density=0.1, target_modules=LINEARS))
    with pytest.raises(ConfigError, match="is quantised, and a dense phase trains the base weights themselves"):
        start_dense_phase(model)

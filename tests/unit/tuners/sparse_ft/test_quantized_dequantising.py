"""Merging without loss: quantised models become ordinary ones, in a dtype that holds their weights."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from peft_sparse import LotteryTicketConfig, iter_deltas, start_dense_phase
from peft_sparse.tuners.common import packed
from peft_sparse.tuners.sparse_ft.layers.quantized import QuantizedLinear

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises the models of these tests")
pytest.importorskip("accelerate", reason="transformers loads quantised models with accelerate")

from tests.support.quantized import BF16, F32, LINEARS, kinds, load, logits, plain, q_proj, tuned  # noqa: E402


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

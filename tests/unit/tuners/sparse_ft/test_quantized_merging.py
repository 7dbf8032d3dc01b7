"""Merging into quantised weights: what is lost is said, unmerging restores every byte, and copies unmerge alone."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_sparse import LotteryTicketConfig
from peft_sparse.tuners.common import packed
from peft_sparse.tuners.sparse_ft.layers.quantized import QuantizedLinear

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes quantises the models of these tests")
pytest.importorskip("accelerate", reason="transformers loads quantised models with accelerate")

from tests.support.quantized import (  # noqa: E402
    LINEARS,
    adapt,
    assert_same_bytes,
    close,
    kinds,
    load,
    logits,
    packed_bytes,
    q_proj,
    tuned,
)


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

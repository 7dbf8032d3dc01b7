"""Bottleneck adapters on quantised and half-precision base models."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training

from peft_sparse import BottleneckConfig, iter_bottlenecks
from tests.support.quantized import IDS, assert_same_bytes, load, logits, packed_bytes, plain, twin

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = ("pfeiffer", "houlsby", "parallel")


def config(kind: str, **changes) -> BottleneckConfig:
    return BottleneckConfig(kind=kind, bottleneck_size=4, activation="gelu", init_weights=False, **changes)


def packed(model) -> dict[str, torch.Tensor]:
    """The quantised weights by the names that they have without adapters."""
    return {name.replace("base_layer.", ""): tensor for name, tensor in packed_bytes(model).items()}


@pytest.mark.parametrize("bits", ["nf4, double", "8 bit"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_quantised_model(kind, bits, tmp_path):
    base = load(bits)
    before, own = packed(base), logits(base)
    torch.manual_seed(0)
    model = get_peft_model(base, config(kind))
    found = logits(model)
    assert (found - own).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), own)
    # The ordinary model that holds the dequantised weights, with the same adapters.
    ordinary = get_peft_model(twin(model), config(kind)).train()
    with torch.no_grad():
        for (_, one), (_, other) in zip(iter_bottlenecks(ordinary), iter_bottlenecks(model), strict=True):
            one.set_weights(other.weights)
    torch.testing.assert_close(found, logits(ordinary), rtol=0, atol=0.05 if bits == "8 bit" else 1e-4)

    model(input_ids=IDS, labels=IDS).loss.backward()
    for _, module in iter_bottlenecks(model):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert_same_bytes(packed(model), before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(bits), tmp_path).train()
    torch.testing.assert_close(logits(loaded), found)
    baked = model.merge_and_unload()
    torch.testing.assert_close(logits(baked), found)
    assert_same_bytes(packed(loaded.unload()), before)


def test_qlora_style_preparation():
    model = prepare_model_for_kbit_training(load("nf4"), use_gradient_checkpointing=True)
    model = get_peft_model(model, config("pfeiffer")).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for _, m in iter_bottlenecks(model) for p in m.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(dtype, autocast):
    base = plain(dtype)
    model = get_peft_model(base, config("pfeiffer"), autocast_adapter_dtype=autocast)
    wanted = torch.float32 if autocast else dtype
    assert {p.dtype for _, m in iter_bottlenecks(model) for p in m.parameters()} == {wanted}
    output = model(input_ids=IDS, labels=IDS)
    assert output.logits.dtype is dtype
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for _, m in iter_bottlenecks(model) for p in m.parameters())


def test_autocast():
    model = get_peft_model(plain(), config("pfeiffer"))
    expected = logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(input_ids=IDS).logits
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)

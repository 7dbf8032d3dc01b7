"""A tiny Llama, loaded quantised in every way that bitsandbytes knows, and the ordinary model that holds the same
weights.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_sparse import RandConfig, iter_deltas
from peft_sparse.tuners.common.packed import dequantize, find_backend

F32, BF16 = torch.float32, torch.bfloat16
IDS = torch.tensor([[3, 5, 7, 9, 2], [4, 4, 11, 22, 1], [1, 6, 2, 8, 8]])
_TOKENS = {"vocab_size": 23, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
# Multiples of 64 and 32: what bitsandbytes' layers for processors with AVX512-BF16 insist on.
_LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}

QUANTIZED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8 bit": {"load_in_8bit": True},
}
kinds = pytest.mark.parametrize("kind", QUANTIZED)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@cache
def saved(kind: str = "llama") -> Path:
    """Where the unquantised model lies."""
    torch.manual_seed(0)
    if kind == "llama":
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**_TOKENS, **_LLAMA, num_hidden_layers=1))
    else:
        dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(**_TOKENS, **dropout, n_embd=64, n_layer=1, n_head=2, n_positions=16))
    folder = TemporaryDirectory(prefix="quantized-case-")
    _folders.append(folder)
    model.save_pretrained(folder.name)
    return Path(folder.name)


_folders: list[TemporaryDirectory] = []


@cache
def _loaded(kind: str, dtype: torch.dtype, compute: torch.dtype, model: str) -> nn.Module:
    settings = dict(QUANTIZED[kind])
    if "load_in_4bit" in settings:
        settings["bnb_4bit_compute_dtype"] = compute
    return AutoModelForCausalLM.from_pretrained(
        saved(model), quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"}, dtype=dtype
    )


def load(kind: str, *, dtype=F32, compute=F32, model="llama") -> nn.Module:
    """A quantised model of its own, in training mode: 8-bit layers then compute with the weights that they hold."""
    return copy.deepcopy(_loaded(kind, dtype, compute, model)).train()


def plain(dtype: torch.dtype = F32, model: str = "llama") -> nn.Module:
    """The model before it was quantised."""
    return AutoModelForCausalLM.from_pretrained(saved(model), dtype=dtype).train()


def request_for(seed: int = 0, **changes) -> RandConfig:
    return RandConfig(**{"density": 0.1, "seed": seed, "target_modules": LINEARS, "init_weights": False, **changes})


def tuned(base: nn.Module, *names: str, **changes) -> nn.Module:
    """The model with random adapters (one "default" if none is named), the first of them active."""
    torch.manual_seed(1)
    names = names or ("default",)
    model = get_peft_model(base, request_for(**changes), adapter_name=names[0])
    for seed, name in enumerate(names[1:], start=1):
        model.add_adapter(name, request_for(seed, **changes))
    for name in names:
        shrink(model, name)
    return model


def shrink(model: nn.Module, adapter: str = "default", factor: float = 0.02) -> None:
    """Make an adapter's values about as large as the weights."""
    for _, _, _, delta in iter_deltas(model, adapter):
        delta.values.data *= factor


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def twin(model: nn.Module, *deltas: dict[str, Tensor]) -> nn.Module:
    """The ordinary float32 model with the dequantised weights of a tuned one, plus dense deltas."""
    ordinary = plain()
    base = {n.replace(".base_layer", ""): m for n, m in model.base_model.model.named_modules()}
    with torch.no_grad():
        for name, parameter in ordinary.named_parameters():
            path, _, part = name.rpartition(".")
            module = base[path].get_base_layer() if hasattr(base[path], "get_base_layer") else base[path]
            backend = find_backend(module) if part == "weight" else None
            parameter.copy_(getattr(module, part) if backend is None else dequantize(module, backend))
            for delta in deltas:
                if name in delta:
                    parameter += delta[name]
    return ordinary


def dense(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    return {name: delta.delta.to_dense() for name, _, _, delta in iter_deltas(model, adapter)}


def packed_bytes(model: nn.Module) -> dict[str, Tensor]:
    """Everything that bitsandbytes holds of the quantised weights: codes, scales, scales of scales."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        name = name.removesuffix(".base_layer").removeprefix("base_model.model.")
        if find_backend(module) is None or hasattr(module, "base_layer"):
            continue
        found[f"{name}.codes"] = module.weight.data.clone()
        state = getattr(module.weight, "quant_state", None)
        if state is not None:
            found[f"{name}.absmax"] = state.absmax.clone()
            if state.nested:
                found[f"{name}.offset"] = state.offset.clone()
                found[f"{name}.absmax2"] = state.state2.absmax.clone()
                found[f"{name}.code2"] = state.state2.code.clone()
        else:
            scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
            found[f"{name}.SCB"] = scales.clone()
    return found


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


def q_proj(model: nn.Module) -> nn.Module:
    return next(m for n, m in model.named_modules() if n.endswith("q_proj"))


def assert_same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
        assert tensor.dtype == other[name].dtype, name


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def adapt(layer):
    return get_peft_model(Holder(layer), RandConfig(density=0.1, target_modules=["layer"], init_weights=False))

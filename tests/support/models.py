"""Tiny models of transformers' classes, each with the same weights every time it is made."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
)

IDS = torch.tensor([[3, 9, 4, 1, 7, 7], [2, 8, 8, 5, 6, 11]])
SMALL = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(cls: type = LlamaForCausalLM, *, seed: int = 0, **fields: Any) -> nn.Module:
    """A decoder of two layers; `fields` of its config beside the sizes, or instead of them."""
    own = {"num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": False}
    return _made(cls, LlamaConfig(**{**SMALL, **own, **fields}), seed)


def bert(cls: type = BertForMaskedLM, *, seed: int = 0, **fields: Any) -> nn.Module:
    """An encoder of two layers."""
    return _made(cls, BertConfig(**{**SMALL, "max_position_embeddings": 16, **fields}), seed)


def gpt2(cls: type = GPT2LMHeadModel, *, seed: int = 0, **fields: Any) -> nn.Module:
    """A decoder of two layers, with layers of the class Conv1D and tied embeddings."""
    sizes = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return _made(cls, GPT2Config(**{**sizes, **fields}), seed)


def t5(*, seed: int = 0, **fields: Any) -> nn.Module:
    """An encoder and a decoder of one layer, with tied embeddings."""
    sizes = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return _made(T5ForConditionalGeneration, T5Config(**{**sizes, "decoder_start_token_id": 0, **fields}), seed)


def bart(*, seed: int = 0, **fields: Any) -> nn.Module:
    """An encoder and a decoder of one layer, with tied embeddings."""
    sizes: dict[str, Any] = {"vocab_size": 20, "d_model": 16, "max_position_embeddings": 16}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 24}
    return _made(BartForConditionalGeneration, BartConfig(**{**sizes, **fields}), seed)


def _made(cls: type, config: PreTrainedConfig, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return cls(config).eval()


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits.detach()


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base model's own parameters, by their names in it."""
    return {
        name.replace("base_model.model.", "", 1).replace(".base_layer", ""): tensor
        for name, tensor in model.named_parameters()
        if "sparse_ft" not in name and "ada_sft" not in name
    }


def picture(model: nn.Module) -> dict[str, object]:
    """All that one can see of a model: modules, hooks, tensors, what trains, what is active, configs, outputs."""
    with torch.no_grad():
        output = model(input_ids=IDS).logits
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    return {
        "modules": {name: type(module) for name, module in model.named_modules()},
        "hooks": hooks,
        "tensors": {n: t.detach().numpy().tobytes() for n, t in chain(model.named_parameters(), model.named_buffers())},
        "trains": {name: p.requires_grad for name, p in model.named_parameters()},
        "active": {n: list(m.active_adapters) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)},
        "configs": {n: c.to_dict() for n, c in getattr(model, "peft_config", {}).items()},
        "output": output.numpy().tobytes(),
    }

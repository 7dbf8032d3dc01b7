"""Tiny models for the tests of what a user does around a tuned model."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_sparse import AdaSftConfig, BottleneckConfig, RandConfig

IDS = torch.tensor([[3, 9, 4, 1, 7, 7], [2, 8, 8, 5, 6, 11]])
SPARSE = {"density": 0.2, "init_weights": False}


def llama(**fields) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **fields})).eval()


def tuned(kind: str = "sparse", model: nn.Module | None = None, **fields):
    """A model with a random adapter of a kind: "sparse" (all linear weights), "all", "ada" or "bottleneck"."""
    configs = {
        "sparse": lambda: RandConfig(**{**SPARSE, "target_modules": "all-linear", **fields}),
        "all": lambda: RandConfig(**{**SPARSE, "target_modules": "all", **fields}),
        "ada": lambda: AdaSftConfig(**{"target_modules": "all-linear", "init_weights": False, **fields}),
        "bottleneck": lambda: BottleneckConfig(**{"bottleneck_size": 4, "init_weights": False, **fields}),
    }
    base = llama() if model is None else model
    torch.manual_seed(1)
    return get_peft_model(base, configs[kind]()).eval()


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids).logits.detach()


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base model's own parameters, by their names in it."""
    return {
        name.replace("base_model.model.", "", 1).replace(".base_layer", ""): tensor
        for name, tensor in model.named_parameters()
        if "sparse_ft" not in name and "ada_sft" not in name
    }

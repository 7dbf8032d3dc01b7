"""A tiny decoder, and a config of each tuner type for it."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_sparse import AdaSftConfig, BottleneckConfig, MadGConfig, RandConfig

CONFIGS = {
    "sparse": lambda: RandConfig(density=0.1, target_modules="all-linear", init_weights=False),
    "ada": lambda: AdaSftConfig(target_modules=["q_proj", "up_proj"], init_weights=False),
    "bottleneck": lambda: BottleneckConfig(bottleneck_size=4, init_weights=False),
    "madg": lambda: MadGConfig(
        bottleneck_size=4,
        language_dim=3,
        typology={"eng": torch.arange(5.0) / 5, "quy": torch.ones(5)},
        language="eng",
        init_weights=False,
    ),
}


def llama(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=32, **more)).eval()

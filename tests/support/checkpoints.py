"""Tiny models, their fine-tuned versions, and both on disk."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 30,
}
IDS = torch.arange(8)[None]


def tiny_llama(dtype: torch.dtype = torch.float32, **fields) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **fields})).to(dtype).eval()


def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES)).eval()


def tiny_classifier(num_labels: int = 3) -> BertForSequenceClassification:
    torch.manual_seed(1)
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=num_labels)).eval()


def tune(model: nn.Module, *, share: float = 1.0, scale: float = 0.01) -> nn.Module:
    """A copy of which a share of the weights moved a little, some of them across zero."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in tuned.parameters():
            moved = torch.rand(parameter.shape, generator=generator) < share
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
            parameter.copy_((parameter.double() + noise * moved).to(parameter.dtype))
    return tuned


def save(model: nn.Module, folder: Path, **options) -> str:
    model.save_pretrained(folder, **options)
    return str(folder)


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS)[0]


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    """Every parameter, bit for bit."""
    wanted = dict(expected.named_parameters(remove_duplicate=False))
    there = dict(found.named_parameters(remove_duplicate=False))
    assert there.keys() == wanted.keys()
    differing = [name for name, tensor in wanted.items() if not torch.equal(bits(there[name]), bits(tensor))]
    assert differing == []

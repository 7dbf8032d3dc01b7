"""Tiny models, their fine-tuned versions, and both on disk."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel

from peft_sparse.checkpoints.native import verify
from peft_sparse.core.delta import SparseDelta
from tests.support.models import SMALL, bert, llama

SIZES = {**SMALL, "vocab_size": 30}
IDS = torch.arange(8)[None]


def tiny_llama(dtype: torch.dtype = torch.float32, **fields) -> nn.Module:
    return llama(**{**SIZES, "num_key_value_heads": 2, **fields}).to(dtype)


def tiny_bert() -> nn.Module:
    return bert(BertModel, **SIZES, max_position_embeddings=512)


def tiny_classifier(num_labels: int = 3) -> nn.Module:
    return bert(BertForSequenceClassification, seed=1, num_labels=num_labels, **SIZES, max_position_embeddings=512)


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


def saved_deltas(file: Path) -> dict[str, SparseDelta]:
    """The deltas of an `adapter_model.safetensors`, checked, by parameter."""
    return verify(load_file(file), source=str(file))


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

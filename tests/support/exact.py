"""Tiny models in float64 for comparisons with formulas and dense twins, and what such comparisons share.

In float64 the sum of weight and delta is exact to 1e-16 whatever the order, so outputs are compared to 1e-9 or closer.
"""

from __future__ import annotations

import copy
import io
import pickle
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

IDS = torch.tensor([[3, 5, 7, 9], [4, 4, 11, 22], [1, 6, 2, 8]])
OWN = ("sparse_ft_", "ada_sft_", "bottleneck_", "mad_g_")  # what adapters' parameters have in their names
_TOKENS = {"vocab_size": 23, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}
_SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2}


def exact_model(kind: str) -> nn.Module:
    """A model of two layers, "llama", "gpt2" or "bert", in float64, of the same weights each time."""
    return _mould(kind).cast()


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and keeps them."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.tensors: dict[int, Tensor] = {}

    def persistent_id(self, found: Any) -> int | None:
        if not isinstance(found, Tensor):
            return None
        self.tensors[id(found)] = found
        return id(found)


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, tensors: dict[int, Tensor]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._tensors = tensors

    def persistent_load(self, key: int) -> Tensor:
        return self._tensors[key]


class _Mould:
    """Copies of a model, six times as fast as by `copy.deepcopy`: the verbs ask for thousands."""

    def __init__(self, model: nn.Module) -> None:
        stream = io.BytesIO()
        pickler = _Pickler(stream)
        pickler.dump(model)
        self._pickled, self._tensors = stream.getvalue(), pickler.tensors

    def cast(self) -> nn.Module:
        return _Unpickler(self._pickled, copy.deepcopy(self._tensors)).load()


@lru_cache
def _mould(kind: str) -> _Mould:
    return _Mould(_original(kind))


def _original(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(**_TOKENS, **_SIZES, num_key_value_heads=1, tie_word_embeddings=False)
        model: nn.Module = LlamaForCausalLM(config)
    elif kind == "gpt2":
        dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": False}
        model = GPT2LMHeadModel(GPT2Config(**_TOKENS, **dropout, n_embd=8, n_layer=2, n_head=2, n_positions=16))
    else:
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertForMaskedLM(BertConfig(**_TOKENS, **_SIZES, **dropout, max_position_embeddings=16))
    # Trained models have norms and biases that are neither ones nor zeros.
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.double().eval()


def logits(model: nn.Module, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **arguments).logits


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of the base model under the names they had before PEFT came."""
    return {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): parameter
        for name, parameter in model.named_parameters()
        if not any(own in name for own in OWN)
    }


def untouched(model: nn.Module, base: nn.Module) -> None:
    """Check that the base parameters are the ones of `base`, bit for bit."""
    found, expected = base_parameters(model), dict(base.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.int64), tensor.view(torch.int64)), name

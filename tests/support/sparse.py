"""What the verbs are tried on: two tiny models in float64, one request per kind of config, the dense model as oracle.

In float64 the sum of weight and delta is exact to 1e-16 whatever the order, so outputs are compared to 1e-10.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_sparse import AdaSftConfig, SparseConfig, iter_deltas
from peft_sparse.tuners.ada_sft.iteration import iter_masked
from peft_sparse.tuners.sparse_ft.configs.base import METHODS

_TOKENS = {"vocab_size": 23, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
IDS = torch.tensor([[3, 5, 7, 9], [4, 4, 11, 22], [1, 6, 2, 8]])


@lru_cache
def _original(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(**_TOKENS, **sizes, num_hidden_layers=2, initializer_range=0.3))
    else:
        sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "initializer_range": 0.3}
        dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(**_TOKENS, **sizes, **dropout))
    # Trained models have norms and biases that are neither ones nor zeros.
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.double().eval()


# What each config asks for. The methods themselves stand at density 0.1; the rest says where and how much.
REQUESTS: dict[str, dict[str, Any]] = {
    **{method: {"method": method, "density": 0.1} for method in METHODS if method not in ("fixed", "given")},
    "global budget, norms and biases": {
        "density": 0.3,
        "budget": "global",
        "target_norms": True,
        "target_biases": True,
    },
    "share per layer": {"density": 0.1, "budget": {r"\.0\.": 0.25, r"\.1\.": 0.75}},
    "every parameter": {"density": 0.3, "target_modules": "all"},
    "one layer, rank for rank": {"equivalent_rank": 1, "layers_to_transform": [1]},
    "embedding by name": {"num_weights": 50, "target_modules": r".*(embed_tokens|wte)"},
    "largest weights": {"method": "one_shot", "criterion": "largest_weight", "density": 0.1, "target_biases": True},
    "given support": {
        "method": "given",
        "support": {"model.layers.1.mlp.up_proj.weight": [3, 20, 7], "model.norm.weight": [1, 2]},
    },
    "bfloat16 values": {"density": 0.1, "values_dtype": "bfloat16"},
    "single parameters": {"density": 0.3, "target_parameters": ["layers.1.mlp.up_proj.weight", "norm.weight"]},
    "soft masks": {"kind": AdaSftConfig},
    "weights under soft masks": {"kind": AdaSftConfig, "phase": "weights", "initial_mask": 0.5},
}
# The same names in the other model.
_GPT2_NAMES = {"layers.1.mlp.up_proj.weight": "h.1.mlp.c_fc.bias", "norm.weight": "ln_f.weight"}
_GPT2_NAMES.update({f"model.{name}": f"transformer.{other}" for name, other in _GPT2_NAMES.items()})


@dataclass(frozen=True)
class Case:
    """A model and a request."""

    kind: str
    request: str

    def base(self) -> nn.Module:
        """A fresh copy of the base model."""
        return copy.deepcopy(_original(self.kind))

    def config(self, **changes: Any) -> SparseConfig | AdaSftConfig:
        fields = {"init_weights": False, "task_type": "CAUSAL_LM", **REQUESTS[self.request], **changes}
        if self.kind == "gpt2" and "target_parameters" in fields:
            fields["target_parameters"] = [_GPT2_NAMES[name] for name in fields["target_parameters"]]
        if self.kind == "gpt2" and "support" in fields:
            fields["support"] = {_GPT2_NAMES[name]: indices for name, indices in fields["support"].items()}
        return fields.pop("kind", SparseConfig)(**fields)

    def model(self, *adapters: str) -> PeftModel:
        """A model with adapters of different values (and, where chance chooses, different supports)."""
        names = adapters or ("default",)
        model = get_peft_model(self.base(), self.config(), adapter_name=names[0])
        fill(model, names[0], 0)
        for number, name in enumerate(names[1:], 1):
            model.add_adapter(name, self.config())
            fill(model, name, number)
        return model.eval()

    def dense(self, *parts: dict[str, Tensor]) -> nn.Module:
        """The base model with dense deltas added to its parameters."""
        model = self.base()
        for part in parts:
            for name, delta in part.items():
                model.get_parameter(name).data += delta
        return model

    def expected(self, *parts: dict[str, Tensor]) -> Tensor:
        """The logits of that dense model."""
        return logits(self.dense(*parts))


def fill(model: nn.Module, adapter: str, number: int) -> None:
    """Give an adapter other values (and another support, if it has one) than any other number does."""
    generator = torch.Generator().manual_seed(100 + number)
    for _, _, masked in iter_masked(model, adapter):
        for parameter in masked.parameters():
            parameter.data = torch.randn(masked.shape, generator=generator)
    for _, _, _, delta in iter_deltas(model, adapter):
        support = torch.randperm(delta.numel, generator=generator)[: delta.count].sort().values
        delta.set_support(support.to(delta.indices.dtype), 0.3 * torch.randn(delta.count, generator=generator))


def dense_deltas(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """{parameter: dense delta} of an adapter: copies, in float64."""
    found = {}
    for name, layer, masked in iter_masked(model, adapter):
        weight = layer.original.detach()
        found[name] = masked_by_the_paper(masked, weight, *masked.parameters()).detach() - weight
    for name, _, _, delta in iter_deltas(model, adapter):
        dense = torch.zeros(delta.numel, dtype=torch.float64)
        dense[delta.indices.long()] = delta.values.detach().double()
        found[name] = dense.view(delta.shape)
    assert sum(int(d.count_nonzero()) for d in found.values()) > 0, "an adapter without weights would prove nothing"
    return found


def masked_by_the_paper(masked: nn.Module, weight: Tensor, *held: Tensor) -> Tensor:
    """W * M with M = sigmoid(S), in float64; `held` are scores, or scores and the difference, in any dtype."""
    start = torch.logit(torch.tensor(masked.initial_mask, dtype=torch.float64))
    mask = torch.sigmoid(start + held[0].double())
    tuned = weight.double() + (held[1].double() if len(held) > 1 else 0)
    return tuned * mask / (masked.initial_mask if masked.from_identity else 1)


def trained_values(model: nn.Module, adapter: str = "default") -> list[nn.Parameter]:
    """What training changes of an adapter, where it has anything."""
    values = [delta.values for _, _, _, delta in iter_deltas(model, adapter) if delta.count]
    return values + [masked.trained for _, _, masked in iter_masked(model, adapter)]


def gradients_by_the_twin(model: nn.Module, adapter: str, twin: nn.Module) -> list[Tensor]:
    """What the gradients of `trained_values` have to be, from those of the dense twin's weights."""
    found = []
    for name, _, _, delta in iter_deltas(model, adapter):
        if delta.count:
            found.append(twin.get_parameter(name).grad.flatten()[delta.indices.long()])
    for name, layer, masked in iter_masked(model, adapter):
        held = [p.detach().double().requires_grad_(p is masked.trained) for p in masked.parameters()]
        masked_by_the_paper(masked, layer.original.detach(), *held).backward(twin.get_parameter(name).grad)
        found += [leaf.grad for leaf in held if leaf.grad is not None]
    return found


def logits(model: nn.Module, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **arguments).logits


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of the base model under the names they had before PEFT came."""
    return {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): parameter
        for name, parameter in model.named_parameters()
        if "sparse_ft_" not in name and "ada_sft_" not in name
    }


def untouched(model: nn.Module, base: nn.Module) -> None:
    """Check that the base parameters are the ones of `base`, bit for bit."""
    found, expected = base_parameters(model), dict(base.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.int64), tensor.view(torch.int64)), name

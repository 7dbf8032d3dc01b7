"""Sparse adapters and soft masks on tiny models in float64: a request per kind of config, the dense model as oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_sparse import AdaSftConfig, SparseConfig, iter_deltas
from peft_sparse.tuners.ada_sft.iteration import iter_masked
from peft_sparse.tuners.sparse_ft.configs.base import METHODS
from tests.support.exact import IDS, exact_model, logits

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
    is_mergeable: ClassVar[bool] = True
    # How far a fresh adapter may be from the base model, and arguments of loading that keep it in float64.
    start: ClassVar[float] = 0.0
    exact: ClassVar[dict[str, Any]] = {}

    @property
    def is_decoder(self) -> bool:
        return True

    def base(self) -> nn.Module:
        """A fresh copy of the base model."""
        return exact_model(self.kind)

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

    def part(self, model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
        """What an adapter holds, as the twin takes it."""
        return dense_deltas(model, adapter)

    def twin(self, *parts: dict[str, Tensor]) -> nn.Module:
        """The base model with dense deltas added to its parameters."""
        model = self.base()
        for part in parts:
            for name, delta in part.items():
                model.get_parameter(name).data += delta
        return model

    def expected(self, *parts: dict[str, Tensor]) -> Tensor:
        """The logits of that dense model."""
        return logits(self.twin(*parts))

    def num_layers(self, part: dict[str, Tensor]) -> int:
        return len({name.rpartition(".")[0] for name in part})

    def ready(self, model: nn.Module) -> nn.Module:
        """A model that was loaded elsewhere, as `model` gives it."""
        return model.eval()

    def fill(self, model: nn.Module, adapter: str, number: int) -> None:
        fill(model, adapter, number)

    def parameters(self, model: nn.Module, adapter: str = "default") -> list[nn.Parameter]:
        """What training changes of an adapter, where it has anything."""
        values = [delta.values for _, _, _, delta in iter_deltas(model, adapter) if delta.count]
        return values + [masked.trained for _, _, masked in iter_masked(model, adapter)]

    def gradients(self, model: nn.Module, *adapters: str) -> list[Tensor]:
        """Those of the last adapter's `parameters` in training, from those of the dense twin's weights."""
        twin = self.twin(*(self.part(model, name) for name in adapters)).train()
        twin(input_ids=IDS, labels=IDS).loss.backward()
        found = []
        for name, _, _, delta in iter_deltas(model, adapters[-1]):
            if delta.count:
                found.append(twin.get_parameter(name).grad.flatten()[delta.indices.long()])
        for name, layer, masked in iter_masked(model, adapters[-1]):
            held = [p.detach().double().requires_grad_(p is masked.trained) for p in masked.parameters()]
            masked_by_the_paper(masked, layer.original.detach(), *held).backward(twin.get_parameter(name).grad)
            found += [leaf.grad for leaf in held if leaf.grad is not None]
        return found


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

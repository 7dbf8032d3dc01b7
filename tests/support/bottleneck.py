"""Bottleneck adapters on tiny models in float64, and the same computed from the papers alone.

The oracle replaces the forward of single modules of the base model by formulas on plain tensors; it shares nothing with
the library but the values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_sparse import BottleneckConfig
from peft_sparse.tuners.bottleneck.iteration import iter_layers
from tests.support.exact import IDS, exact_model, logits

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pfeiffer on post-norm": ("bert", {}),
    "pfeiffer on pre-norm": ("llama", {"scaling": "learned"}),
    "pfeiffer with nice": ("bert", {"invertible": "nice", "scaling": 0.5}),
    "pfeiffer with glow": ("bert", {"invertible": "glow", "activation": "tanh"}),
    "nice on a decoder": ("llama", {"invertible": "nice"}),
    "houlsby": ("bert", {"kind": "houlsby", "activation": "gelu"}),
    "houlsby on pre-norm": ("gpt2", {"kind": "houlsby"}),
    "parallel, residual": ("bert", {"kind": "parallel", "scaling": 4.0}),
    "parallel": ("llama", {"kind": "parallel"}),
    "one layer": ("gpt2", {"leave_out": [-1]}),
}
# {path of the site: its adapter's tensors by name}
Part = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A request on a model."""

    request: str
    is_mergeable: ClassVar[bool] = False
    start: ClassVar[float] = 0.05
    exact: ClassVar[dict[str, Any]] = {"autocast_adapter_dtype": False}

    @property
    def kind(self) -> str:
        return REQUESTS[self.request][0]

    @property
    def is_decoder(self) -> bool:
        return self.kind != "bert"

    def base(self) -> nn.Module:
        """A fresh copy of the base model."""
        return exact_model(self.kind)

    def config(self, **changes: Any) -> BottleneckConfig:
        fields = {"bottleneck_size": 3, "init_weights": False, **REQUESTS[self.request][1], **changes}
        return BottleneckConfig(**fields)

    def model(self, *adapters: str) -> PeftModel:
        """A model with adapters of different values, in float64."""
        names = adapters or ("default",)
        model = get_peft_model(self.base(), self.config(), adapter_name=names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            model.add_adapter(name, self.config(), autocast_adapter_dtype=False)
        for number, name in enumerate(names):
            fill(model, name, number)
        return model.eval()

    def twin(self, *parts: Part) -> nn.Module:
        """The base model that computes what these adapters, one above the other, make of it, from the formulas."""
        model = self.base()
        fields = REQUESTS[self.request][1]
        for path in dict.fromkeys(path for part in parts for path in part):
            stack = [part[path] for part in parts if path in part]
            install_formulas(model, path, stack, fields)
        return model

    def expected(self, *parts: Part) -> Tensor:
        return logits(self.twin(*parts))

    def part(self, model: nn.Module, adapter: str = "default") -> Part:
        """What an adapter holds, as the twin takes it."""
        return tensors_of(model, adapter)

    def num_layers(self, part: Part) -> int:
        return len(part)

    def ready(self, model: nn.Module) -> nn.Module:
        """A model that was loaded elsewhere, as `model` gives it."""
        for _, layer in iter_layers(model):
            layer.bottleneck_adapters.double()
        return model.eval()

    def fill(self, model: nn.Module, adapter: str, number: int) -> None:
        fill(model, adapter, number)

    def parameters(self, model: nn.Module, adapter: str = "default") -> list[nn.Parameter]:
        """What training changes of an adapter."""
        return [parameter for _, parameter in parameters_of(model, adapter)]

    def gradients(self, model: nn.Module, *adapters: str) -> list[Tensor]:
        """Those of the last adapter's `parameters` in training, from the formulas."""
        parts = [tensors_of(model, name) for name in adapters]
        for tensors in parts[-1].values():
            for tensor in tensors.values():
                tensor.requires_grad_()
        self.twin(*parts)(input_ids=IDS, labels=IDS).loss.backward()
        found = {f"{path}.{name}": tensor.grad for path, part in parts[-1].items() for name, tensor in part.items()}
        return [found[name] for name, _ in parameters_of(model, adapters[-1])]


def install_formulas(model: nn.Module, path: str, stack: list[dict[str, Tensor]], fields: dict[str, Any]) -> None:
    """Put the formulas for one site into the base model."""
    act = {"relu": torch.relu, "gelu": nn.functional.gelu, "tanh": torch.tanh}[fields.get("activation", "relu")]
    scale = fields.get("scaling", 1.0)

    def add(adapter: dict[str, Tensor], h: Tensor) -> Tensor:
        inside = act(h @ adapter["down.weight"].T + adapter["down.bias"])
        factor = adapter["scaling"] if scale == "learned" else scale
        return factor * (inside @ adapter["up.weight"].T + adapter["up.bias"])

    def summed(h: Tensor) -> Tensor:
        return sum(add(adapter, h) for adapter in stack)

    def stacked(h: Tensor) -> Tensor:
        for adapter in stack:
            h = h + add(adapter, h)
        return h

    parent = model.get_submodule(path.rpartition(".")[0])
    if "first.down.weight" in stack[0]:
        _install_couplings(model, model.get_submodule(path), stack, act)
    elif path.endswith("output.LayerNorm"):

        def post_norm(hidden: Tensor, residual: Tensor) -> Tensor:
            r = parent.dense(hidden) + residual
            for adapter in stack:
                r = r + add(adapter, parent.LayerNorm(r))
            return parent.LayerNorm(r)

        parent.forward = post_norm
    elif path.endswith("output.dropout") and fields["kind"] == "houlsby":
        parent.forward = lambda hidden, residual: parent.LayerNorm(stacked(parent.dense(hidden)) + residual)
    elif path.endswith("output.dropout"):
        parent.forward = lambda hidden, x: parent.LayerNorm(parent.dense(hidden) + x + summed(x))
    elif fields.get("kind") == "houlsby":
        _wrap(model.get_submodule(path), lambda x, out: stacked(out))
    elif fields.get("kind") == "parallel":
        _wrap(model.get_submodule(path), lambda x, out: out + summed(x))
    else:
        _wrap(parent, lambda x, out: stacked(out))


def _install_couplings(model: nn.Module, embeddings: nn.Module, stack: list[dict[str, Tensor]], act: Callable) -> None:
    def net(adapter: dict[str, Tensor], name: str, h: Tensor) -> Tensor:
        inside = act(h @ adapter[f"{name}.down.weight"].T + adapter[f"{name}.down.bias"])
        return inside @ adapter[f"{name}.up.weight"].T + adapter[f"{name}.up.bias"]

    def shift(half: Tensor, given: Tensor, back: bool) -> Tensor:
        if given.shape[-1] == half.shape[-1]:
            return half - given if back else half + given
        s, t = given[..., : half.shape[-1]], given[..., half.shape[-1] :]
        e = torch.exp(0.636 * 5 * torch.atan(s / 5))
        return (half - t) / e if back else half * e + t

    def forward(x: Tensor) -> Tensor:
        for adapter in stack:
            one, two = x[..., :4], x[..., 4:]
            one = shift(one, net(adapter, "first", two), False)
            two = shift(two, net(adapter, "second", one), False)
            x = torch.cat([one, two], -1)
        return x

    def backward(y: Tensor) -> Tensor:
        for adapter in reversed(stack):
            one, two = y[..., :4], y[..., 4:]
            two = shift(two, net(adapter, "second", one), True)
            one = shift(one, net(adapter, "first", two), True)
            y = torch.cat([one, two], -1)
        return y

    _wrap(embeddings, lambda x, out: forward(out))
    head = model.get_output_embeddings()
    inner = head.forward
    head.forward = lambda hidden: inner(backward(hidden))


def _wrap(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return change(args[0] if args else None, inner(*args, **kwargs))

    module.forward = forward


@torch.no_grad()
def fill(model: nn.Module, adapter: str, number: int) -> None:
    """Give an adapter other values than any other number does."""
    generator = torch.Generator().manual_seed(100 + number)
    for _, parameter in parameters_of(model, adapter):
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def parameters_of(model: nn.Module, adapter: str) -> list[tuple[str, nn.Parameter]]:
    """(path of the site and name, parameter) of everything in an adapter."""
    return [
        (f"{path}.{name}", parameter)
        for path, layer in iter_layers(model)
        if adapter in layer.bottleneck_adapters
        for name, parameter in layer.bottleneck_adapters[adapter].named_parameters()
    ]


def tensors_of(model: nn.Module, adapter: str) -> Part:
    """Copies of an adapter's tensors, in float64."""
    return {
        path: {
            name: parameter.detach().double().clone()
            for name, parameter in layer.bottleneck_adapters[adapter].named_parameters()
        }
        for path, layer in iter_layers(model)
        if adapter in layer.bottleneck_adapters
    }

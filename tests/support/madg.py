"""MAD-G adapters on tiny models in float64, and the same from the thesis' formulas on plain tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_sparse import MadGConfig, set_language
from peft_sparse.tuners.madg.layer import MadGLayer
from peft_sparse.tuners.madg.model import iter_sites
from tests.support.bottleneck import Case, Part, install_formulas
from tests.support.exact import IDS, logits

NUM_FEATURES = 7
_made = torch.Generator().manual_seed(3)
VECTORS = {code: (torch.rand(NUM_FEATURES, generator=_made) < 0.5).float() for code in ("eng", "quy", "ace", "bxr")}
VECTORS["mlt"] = torch.rand(NUM_FEATURES, generator=_made)

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "MAD-G": ("pfeiffer on post-norm", {}),
    "MAD-G-LS": ("pfeiffer on post-norm", {"layer_dim": 3}),
    "MAD-G on pre-norm": ("pfeiffer on pre-norm", {"scaling": 0.5}),
    "MAD-G-LS, houlsby": ("houlsby", {"kind": "houlsby", "activation": "gelu", "layer_dim": 2}),
    "MAD-G, parallel": ("parallel, residual", {"kind": "parallel", "scaling": 4.0}),
}


@dataclass(frozen=True)
class MadGCase:
    """A request on a model; with a `language`, models are set to it and twins are of it."""

    request: str
    language: str | None = None
    is_mergeable: ClassVar[bool] = False
    start: ClassVar[float] = 0.05
    exact: ClassVar[dict[str, Any]] = {"autocast_adapter_dtype": False}

    @property
    def is_decoder(self) -> bool:
        return self.bottleneck.is_decoder

    @property
    def bottleneck(self) -> Case:
        return Case(REQUESTS[self.request][0])

    def base(self) -> nn.Module:
        """A fresh copy of the base model."""
        return self.bottleneck.base()

    def config(self, **changes: Any) -> MadGConfig:
        fields = {"bottleneck_size": 3, "language_dim": 4, "typology": VECTORS, "init_weights": False}
        fields["language"] = self.language
        return MadGConfig(**{**fields, **REQUESTS[self.request][1], **changes})

    def model(self, *adapters: str, **changes: Any) -> PeftModel:
        """A model with hypernetworks of different values, in float64, with no language set."""
        names = adapters or ("default",)
        config = self.config(**changes)
        model = get_peft_model(self.base(), config, adapter_name=names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
        for number, name in enumerate(names):
            fill_generators(model, name, number)
        return model.eval()

    def expected(self, model: nn.Module, language: str, *adapters: str) -> Tensor:
        """Logits from the formulas, with the values of a model's hypernetworks."""
        return logits(self.twin(*(plain(model, name) for name in adapters or ("default",)), language=language))

    def twin(self, *networks: dict[str, Any], language: str | None = None) -> nn.Module:
        """The base model that computes what one generated adapter above the other makes of it."""
        case, fields = self.bottleneck, {**REQUESTS[self.request][1]}
        fields.pop("layer_dim", None)
        model = case.base()
        parts = [generated(network, language or self.language) for network in networks]
        for path in parts[0]:
            install_formulas(model, path, [part[path] for part in parts], fields)
        return model

    def part(self, model: nn.Module, adapter: str = "default") -> dict[str, Any]:
        """What a hypernetwork holds, as the twin takes it."""
        return plain(model, adapter)

    def num_layers(self, part: dict[str, Any]) -> int:
        return len(part["W"])

    def ready(self, model: nn.Module) -> nn.Module:
        """A model that was loaded elsewhere, as `model` gives it."""
        for module in model.modules():
            if isinstance(module, MadGLayer):
                module.mad_g_generators.double()
        set_language(model, self.language)
        return model.eval()

    def fill(self, model: nn.Module, adapter: str, number: int) -> None:
        fill_generators(model, adapter, number)

    def parameters(self, model: nn.Module, adapter: str = "default") -> list[nn.Parameter]:
        """What training changes of a hypernetwork."""
        return [parameter for _, parameter in generator_parameters(model, adapter)]

    def gradients(self, model: nn.Module, *adapters: str) -> list[Tensor]:
        """Those of the last hypernetwork's `parameters` in training, from the formulas."""
        networks = [plain(model, name) for name in adapters]
        self.twin(*networks)(input_ids=IDS, labels=IDS).loss.backward()
        found = gradients(networks[-1])
        return [found[name] for name, _ in generator_parameters(model, adapters[-1])]


def plain(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """Copies of a hypernetwork's tensors: "V", "W" (or one for each site), "e" for each site."""
    sites = dict(iter_sites(model, adapter))
    first = next(iter(sites.values())).shared

    def copied(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double().clone().requires_grad_()

    one = copied(first.generator)
    return {
        "V": copied(first.language_projection),
        "W": {path: one if one is not None else copied(site.generator) for path, site in sites.items()},
        "e": {path: copied(getattr(site, "layer_embedding", None)) for path, site in sites.items()},
    }


def generated(network: dict[str, Any], language: str) -> Part:
    """Equations 3.1 and 3.2, entry by entry: {path: the adapter's tensors}."""
    t = VECTORS[language].double()
    embedding = [sum(v * x for v, x in zip(row, t, strict=True)) for row in network["V"]]
    found: Part = {}
    for path, generator in network["W"].items():
        layer = network["e"][path]
        given = torch.stack([*embedding, *(layer if layer is not None else [])])
        theta = (generator * given[None]).sum(1)
        size = 3
        width = len(theta) // (2 * size)
        found[path] = {
            "down.weight": torch.stack([theta[i * width : (i + 1) * width] for i in range(size)]),
            "up.weight": torch.stack(
                [theta[size * width + i * size : size * width + (i + 1) * size] for i in range(width)]
            ),
            "down.bias": torch.zeros(size, dtype=torch.float64),
            "up.bias": torch.zeros(width, dtype=torch.float64),
        }
    return found


@torch.no_grad()
def fill_generators(model: nn.Module, adapter: str, number: int) -> None:
    """Give a hypernetwork other values than any other number does."""
    generator = torch.Generator().manual_seed(200 + number)
    for _, parameter in generator_parameters(model, adapter):
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))


def generator_parameters(model: nn.Module, adapter: str = "default") -> list[tuple[str, nn.Parameter]]:
    """(path of the site and name, parameter) of everything in a hypernetwork."""
    return [
        (f"{path}.{name}", parameter)
        for path, site in iter_sites(model, adapter)
        for name, parameter in site.named_parameters()
    ]


def gradients(network: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients of `plain` tensors, under the names of `generator_parameters`."""
    paths = list(network["W"])
    found = {f"{paths[0]}.shared.language_projection": network["V"].grad}
    if network["e"][paths[0]] is not None:
        found[f"{paths[0]}.shared.generator"] = network["W"][paths[0]].grad
        found.update({f"{path}.layer_embedding": network["e"][path].grad for path in paths})
    else:
        found.update({f"{path}.generator": network["W"][path].grad for path in paths})
    return found

"""An adapter of each type, none of which is the identity, for what all of them must do alike."""

from __future__ import annotations

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_sparse import AdaSftConfig, BottleneckConfig, MadGConfig, RandConfig
from tests.support.models import llama

TYPES = ("SPARSE_FT", "ADA_SFT", "BOTTLENECK", "MAD_G")
_VECTORS = {"eng": torch.linspace(0, 1, 289), "quy": torch.linspace(1, 0, 289)}


def config(kind: str, /, **fields) -> PeftConfig:
    if kind == "SPARSE_FT":
        return RandConfig(**{"density": 0.2, "target_modules": "all-linear", "init_weights": False, **fields})
    if kind == "ADA_SFT":
        return AdaSftConfig(**{"target_modules": "all-linear", "init_weights": False, **fields})
    if kind == "BOTTLENECK":
        return BottleneckConfig(**{"bottleneck_size": 4, "init_weights": False, **fields})
    sizes = {"bottleneck_size": 4, "language_dim": 3, "typology": _VECTORS, "language": "quy", "init_weights": False}
    return MadGConfig(**{**sizes, **fields})


def adapted(kind: str, base: nn.Module, /, *names: str, **fields) -> PeftModel:
    """The base model with adapters of these names ("default" if none is given), each of other values."""
    names = names or ("default",)
    torch.manual_seed(1)
    model = get_peft_model(base, config(kind, **fields), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(kind, **fields))
    for tuned, parameter in model.named_parameters():
        if any(f".{name}." in tuned for name in names) and parameter.is_floating_point():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


SPARSE = {"density": 0.2, "init_weights": False}


def tuned(kind: str = "sparse", model: nn.Module | None = None, **fields) -> PeftModel:
    """A model with a random adapter of a kind: "sparse" (all linear weights), "all", "ada" or "bottleneck"."""
    configs = {
        "sparse": lambda: RandConfig(**{**SPARSE, "target_modules": "all-linear", **fields}),
        "all": lambda: RandConfig(**{**SPARSE, "target_modules": "all", **fields}),
        "ada": lambda: config("ADA_SFT", **fields),
        "bottleneck": lambda: config("BOTTLENECK", **fields),
    }
    base = llama() if model is None else model
    torch.manual_seed(1)
    return get_peft_model(base, configs[kind]()).eval()


# Configs of each type as their defaults are, with little else said.
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

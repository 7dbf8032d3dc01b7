"""One adapter of each tuner type, none of which is the identity, for what all of them must do alike."""

from __future__ import annotations

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_sparse import AdaSftConfig, BottleneckConfig, MadGConfig, RandConfig

TYPES = ("SPARSE_FT", "ADA_SFT", "BOTTLENECK", "MAD_G")
_VECTORS = {"eng": torch.linspace(0, 1, 289), "quy": torch.linspace(1, 0, 289)}


def config(kind: str, **fields) -> PeftConfig:
    if kind == "SPARSE_FT":
        return RandConfig(**{"density": 0.2, "target_modules": "all-linear", "init_weights": False, **fields})
    if kind == "ADA_SFT":
        return AdaSftConfig(**{"target_modules": "all-linear", "init_weights": False, **fields})
    if kind == "BOTTLENECK":
        return BottleneckConfig(**{"bottleneck_size": 4, "init_weights": False, **fields})
    sizes = {"bottleneck_size": 4, "language_dim": 3, "typology": _VECTORS, "language": "quy", "init_weights": False}
    return MadGConfig(**{**sizes, **fields})


def adapted(kind: str, base: nn.Module, *names: str, **fields) -> PeftModel:
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

"""The methods: their configs for a language and for a task. Norms stay frozen in all of them, as in the papers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import nn

from peft_sparse import (
    BottleneckConfig,
    DeftXConfig,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SpielAGConfig,
)


@dataclass(frozen=True)
class Request:
    """What a config is made of.

    Attributes:
        model: that is to be adapted.
        density: share of the encoder's weights.
        l1: of language adapters; 0 for a task.
        head: modules that are trained whole and saved: those of a task. A language's head stays behind.
        seed: of random supports.
    """

    model: nn.Module
    density: float
    l1: float
    head: list[str]
    seed: int

    @property
    def sparse(self) -> dict[str, Any]:
        """Of all methods that choose among the encoder's weights."""
        common = {"target_modules": "all", "target_norms": False, "modules_to_save": self.head or None}
        return {**common, "density": self.density, "l1": self.l1}

    @property
    def outside(self) -> str:
        """A regular expression for the modules outside the encoder."""
        return f"(?!{re.escape(self.model.base_model_prefix)}\\.).*"

    @property
    def linear(self) -> list[str]:
        """The encoder's linear layers."""
        prefix = f"{self.model.base_model_prefix}."
        return [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and n.startswith(prefix)]


def spiel(request: Request) -> PeftConfig:
    settings = {**request.sparse, "target_modules": request.linear}
    settings.pop("target_norms")
    return SpielAGConfig(**settings, seed=request.seed, reselection_steps=20, estimation_steps=5)


def bitfit(request: Request) -> PeftConfig:
    """BitFit: all biases of the encoder, and no other weight."""
    return RandConfig(
        density=1.0,
        target_parameters=["bias"],
        exclude_modules=request.outside,
        modules_to_save=request.head or None,
        l1=request.l1,
    )


def lora(request: Request) -> PeftConfig:
    """Of the rank that comes nearest to the density, by the number of weights."""
    layers = [request.model.get_submodule(name) for name in request.linear]
    encoder = sum(p.numel() for p in request.model.base_model.parameters())
    rank = max(1, round(request.density * encoder / sum(m.in_features + m.out_features for m in layers)))
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=request.linear, modules_to_save=request.head or None)


def mad_x(request: Request) -> PeftConfig:
    """MAD-X 2.0: the last layer has neither a language adapter nor a task adapter."""
    if request.head:
        return BottleneckConfig(reduction_factor=16, leave_out=[-1], modules_to_save=request.head)
    return BottleneckConfig(reduction_factor=2, invertible="nice", leave_out=[-1])


@dataclass(frozen=True)
class Method:
    """A method: its config, and how its learning rate relates to the recipe's, which is LT-SFT's."""

    config: Callable[[Request], PeftConfig]
    rate_factor: float = 1.0


METHODS = {
    "lt_sft": Method(lambda r: LotteryTicketConfig(**r.sparse)),
    "deft_x": Method(lambda r: DeftXConfig(**r.sparse)),
    "rand": Method(lambda r: RandConfig(**r.sparse, seed=r.seed), rate_factor=2.0),
    "fisher": Method(lambda r: OneShotConfig(**r.sparse, criterion="fisher", selection_batches=16)),
    "spiel_ag": Method(spiel, rate_factor=2.0),
    "bitfit": Method(bitfit, rate_factor=4.0),
    "mad_x": Method(mad_x, rate_factor=2.0),
    "lora": Method(lora, rate_factor=2.0),
}
# As an option of a command line.
MethodName = Enum("MethodName", {name: name for name in METHODS}, type=str)

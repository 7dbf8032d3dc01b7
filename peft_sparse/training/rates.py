"""The learning rate that each method wants, and a line in the log for a training run that is far from it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..optim.sm3 import SM3
from ..tuners.ada_sft.config import AdaSftConfig
from ..tuners.common.adapter_config import carrier_of
from ..tuners.common.base_model import base_model_of
from ..tuners.sparse_ft.configs.base import DENSE_PHASE, SparseConfig
from ..tuners.sparse_ft.iteration import iter_deltas
from ..tuners.sparse_ft.unselected import is_unselected, open_phase

logger = logging.getLogger(__name__)

# A rate that is off by this factor is worth a word.
FACTOR = 10
_LARGE = 1_000_000_000
# Rates of other optimizers (SGD, Lion, Adafactor, ...) are on other scales.
_ADAM_ENDINGS = ("adam", "adamw", "adam8bit", "adamw8bit", "sm3")


@dataclass(frozen=True)
class Rates:
    """Peak learning rates that worked for a method.

    Attributes:
        low, high: the smallest and the largest; equal if there is a single figure.
        source: where the figures come from.
    """

    low: float
    high: float
    source: str


_MEASURED = "chosen for SmolLM2-135M by example and benchmark; elsewhere a guess"
_TABLE = "thesis, Table 7.1: Llama 2 of 7B and 13B"
_THESIS = "5e-5 in the thesis, section 4.4.2; the rest of the range is a guess"


def recommended(config: Any, num_parameters: int, *, with_sm3: bool = False) -> Rates | None:
    """The learning rates that are known to work for a method.

    Args:
        config: of an adapter.
        num_parameters: of the base model: the larger, the smaller the rates.
        with_sm3: whether the optimizer is SM3, whose steps shrink, so that it starts larger.

    Returns:
        the rates; None for a method without known ones.
    """
    if isinstance(config, AdaSftConfig):
        return None  # masks and weights differ by a factor of 500
    if not isinstance(config, SparseConfig):
        return None
    is_large = num_parameters >= _LARGE
    if is_unselected(config):
        return Rates(2e-5, 2e-4, _THESIS) if config.selected_by == DENSE_PHASE else None
    if config.selected_by == DENSE_PHASE:
        return Rates(5e-5, 2e-3, _THESIS)
    if with_sm3:
        return Rates(4e-4, 1e-3, _TABLE) if is_large else Rates(8e-3, 8e-3, _MEASURED)
    if config.method == "rand" or config.fitted_rate or getattr(config, "random_share", 0):
        return Rates(1e-4, 4e-3, _MEASURED) if is_large else Rates(2e-3, 4e-3, _MEASURED)
    if config.method.startswith("spiel"):
        return Rates(1e-5, 1e-4, _TABLE) if is_large else Rates(2e-3, 2e-3, _MEASURED)
    return Rates(5e-4, 2e-3, _MEASURED)


def warn_of_rate(model: nn.Module, optimizer: Any) -> None:
    """Say in the log if a trainable adapter's learning rate is off by a factor of `FACTOR` or more.

    Args:
        model: the model, wrapped or not.
        optimizer: the trainer's, whose scheduler has noted its peak rates; others than Adam's kind and SM3 are not
            judged.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if not isinstance(optimizer, Optimizer) or not type(optimizer).__name__.lower().endswith(_ADAM_ENDINGS):
        return
    rate_of = {
        id(parameter): float(group.get("initial_lr", group["lr"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    count = sum(p.numel() for p in base_model_of(model).parameters())
    carrier = carrier_of(model)
    for name, config in (carrier.peft_config if carrier is not None else {}).items():
        known = recommended(config, count, with_sm3=isinstance(optimizer, SM3))
        found = {rate_of[id(p)] for p in _trained(model, name, config) if id(p) in rate_of}
        if known is None or not any(found):
            continue
        if (rate := max(found)) * FACTOR <= known.low * (1 + 1e-9):
            _warn(name, config, rate, known, f"{known.low / rate:.0f} times smaller than")
        elif (rate := min(found)) * (1 + 1e-9) >= known.high * FACTOR:
            _warn(name, config, rate, known, f"{rate / known.high:.0f} times larger than")


def _trained(model: nn.Module, name: str, config: Any) -> list[nn.Parameter]:
    """What an optimizer trains of an adapter: its values, or in a dense phase the weights of the base model."""
    if is_unselected(config):
        base = base_model_of(model)
        is_open = getattr(open_phase(base), "adapter_name", None) == name
        return [p for p in base.parameters() if p.requires_grad] if is_open else []
    return [delta.values for *_, delta in iter_deltas(model, name) if delta.values.requires_grad]


def _warn(name: str, config: Any, rate: float, known: Rates, how_far: str) -> None:
    figures = f"{known.low:g}" if known.low == known.high else f"{known.low:g} to {known.high:g}"
    logger.warning(
        "the learning rate %g of adapter %r (%s) is %s what this method usually wants: %s (%s). Set learning_rate in "
        "the training arguments; trainers' defaults are made for full fine-tuning.",
        rate,
        name,
        type(config).__name__,
        how_far,
        figures,
        known.source,
    )

"""Configs of the methods whose support is chosen before training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...errors import ConfigError
from .config import SparseConfig, method_name


@method_name("rand")
@dataclass
class RandConfig(SparseConfig):
    """Rand-SFT: tune weights drawn uniformly at random, exactly as many as asked for.

    Args:
        seed: the support is a function of this number and the parameters' names alone.

    Source: the random baseline of Ansell et al. 2022, arXiv:2110.07560, section 4, and of the SC-SFT report, section 3.
    Draws exactly K weights without replacement; the report writes Bernoulli(p), its code draws exactly K as well.
    """

    method: str = field(default="rand", metadata={"help": "How the weights to tune are chosen."})
    seed: int = field(default=0, metadata={"help": "Seed of the random support."})

    starts_random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"seed must be an int >= 0, got {self.seed!r}.")

"""The methods of the cross-lingual benchmark: their configs and learning rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftConfig

from peft_sparse import AdaSftConfig, DeftXConfig, LotteryTicketConfig, RandConfig

FULL = "full"


@dataclass(frozen=True)
class Request:
    """What a config is made of.

    Attributes:
        count: number of weights; LoRA of `rank` has as many.
        seed: of random supports.
        head: modules that train whole.
        linear: the linear layers outside the head.
        outside: a regex for the modules outside the encoder.
        budget: the layer budget of SC-SFT.
    """

    count: int
    rank: int
    seed: int
    head: list[str]
    linear: list[str]
    outside: str
    budget: str

    @property
    def everything(self) -> dict[str, Any]:
        return {"num_weights": self.count, "target_modules": "all", "modules_to_save": self.head or None}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        rates: candidates for the learning rate of the task adapter; for methods of two phases, of the second.
        language_rate: of the language adapter; None for a method that makes none.
        config: the adapter's; None where the dense phase itself is the result.
        selects: whether the shared dense phase chooses the weights.
        is_ours: whether `SparseTrainer` trains it.
        mask_args: where a mask phase, which the trainer runs itself, differs.
    """

    rates: tuple[float, ...]
    language_rate: float | None
    config: Callable[[Request], PeftConfig] | None
    selects: bool = False
    is_ours: bool = True
    mask_args: dict[str, Any] = field(default_factory=dict)


def biases(request: Request) -> PeftConfig:
    return RandConfig(
        density=1.0,
        target_parameters=["bias"],
        exclude_modules=request.outside,
        modules_to_save=request.head or None,
    )


def lora(request: Request) -> PeftConfig:
    return LoraConfig(
        r=request.rank,
        lora_alpha=2 * request.rank,
        target_modules=request.linear,
        modules_to_save=request.head or None,
    )


def ada_sft(request: Request) -> PeftConfig:
    return AdaSftConfig(target_modules=request.linear, modules_to_save=request.head or None)


LT_SFT, BITFIT = "LT-SFT", "BitFit"
CHOSEN, CHOSEN_LANGUAGE = (5e-4, 1e-3), 5e-4
METHODS = {
    LT_SFT: Method(CHOSEN, CHOSEN_LANGUAGE, lambda r: LotteryTicketConfig(**r.everything), selects=True),
    "SC-SFT": Method(
        CHOSEN,
        CHOSEN_LANGUAGE,
        lambda r: LotteryTicketConfig(**r.everything, budget=r.budget),
        selects=True,
    ),
    "DeFT-X": Method(
        CHOSEN,
        CHOSEN_LANGUAGE,
        lambda r: DeftXConfig(**r.everything, rank=0.9),
        selects=True,
    ),
    "Rand-SFT": Method((1e-3, 2e-3), 1e-3, lambda r: RandConfig(**r.everything, seed=r.seed)),
    "Ada-SFT": Method((2e-4,), None, ada_sft, mask_args={"learning_rate": 1e-2}),
    BITFIT: Method((2e-3, 5e-3), 2e-3, biases),
    "LoRA": Method((1e-3, 2e-3), 1e-3, lora, is_ours=False),
    FULL: Method((2e-4,), 2e-4, None),
}

"""Heads (`modules_to_save`) and names of adapters: what every tuner of this package does with them alike."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper

from ..errors import ConfigError

# What PEFT adds to `modules_to_save` of the config that it was given once the adapter is in: too late for our copy.
_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def with_heads(config: PeftConfig) -> list[str] | None:
    """`modules_to_save` with the heads that PEFT adds for the task."""
    asked: Any = config.modules_to_save
    own = list(asked or ())
    heads = _HEADS.get(config.task_type or "", ())
    return [*own, *(head for head in heads if head not in own)] or asked


def check_names(tuner: BaseTuner, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """Refuse a combination of adapters that do not exist, or under a name that is taken.

    Raises:
        ConfigError: the message says which names there are.
    """
    known = sorted(tuner.peft_config)
    unknown = [name for name in adapters if name not in tuner.peft_config]
    if unknown or not adapters:
        raise ConfigError(f"adapters must name adapters of this model, got {adapters}. It has {known}.")
    if len(adapters) != len(weights):
        raise ConfigError(f"weights must hold one number per adapter, got {len(weights)} for {len(adapters)} adapters.")
    if adapter_name in tuner.peft_config:
        raise ConfigError(
            f"adapter_name {adapter_name!r} is taken; this model has {known}. Delete it first, or choose another name."
        )


def choose_head(tuner: BaseTuner, adapters: list[str], head_from: str | None) -> str | None:
    """The adapter whose heads a combination gets: `head_from`, or the only one that has any.

    Raises:
        ConfigError: `head_from` has none, or several have some and it is None.
    """
    having = [name for name in dict.fromkeys(adapters) if tuner.peft_config[name].modules_to_save]
    if head_from is not None:
        if head_from not in having:
            raise ConfigError(
                f"head_from must be one of the combined adapters that have heads ({having}), got {head_from!r}."
            )
        return head_from
    if len(having) > 1:
        raise ConfigError(
            f"the adapters {having} all have heads (modules_to_save): say whose to keep with head_from=..."
        )
    return having[0] if having else None


def copy_heads(tuner: BaseTuner, source: str, target: str) -> None:
    """Give an adapter the values of another one's heads."""
    for module in tuner.model.modules():
        if isinstance(module, ModulesToSaveWrapper) and source in module.modules_to_save:
            module.modules_to_save[target].load_state_dict(module.modules_to_save[source].state_dict())

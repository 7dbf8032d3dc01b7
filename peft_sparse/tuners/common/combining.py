"""What `add_weighted_adapter` of every tuner does alike: what it refuses, and what the new adapter takes over."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from peft import PeftConfig

from ..._peft_bridge import AuxiliaryTrainingWrapper, BaseTuner, ModulesToSaveWrapper
from ...checks import check_factors
from ...errors import ConfigError
from .base_model import modules_of_adapter


class Combined(NamedTuple):
    """The sum of adapters, as a tuner type means it.

    Attributes:
        config: of the new adapter.
        write: puts the sum into the new adapter of a name, which is in the model by then.
    """

    config: PeftConfig
    write: Callable[[str], None]


def add_combined(tuner: BaseTuner, combined: Combined, adapter_name: str, *, head: str | None) -> None:
    """Add the sum of adapters as a new one, which is not activated; if that fails, the model is as it was before.

    Args:
        tuner: the model that holds the adapters.
        combined: their sum.
        adapter_name: name of the new adapter.
        head: the adapter whose heads it gets.
    """
    with ExitStack() as undo:
        tuner.peft_config[adapter_name] = combined.config
        tuner.inject_adapter(tuner.model, adapter_name)
        undo.callback(tuner.delete_adapter, adapter_name)
        combined.write(adapter_name)
        _check_finite(tuner, adapter_name)
        if head:
            copy_heads(tuner, head, adapter_name)
        tuner.set_requires_grad(adapter_name, requires_grad=False)
        undo.pop_all()


def _check_finite(tuner: BaseTuner, adapter_name: str) -> None:
    """Refuse a sum that its dtype does not hold."""
    for module in modules_of_adapter(tuner.model, adapter_name):
        for parameter in module.parameters():
            if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
                raise ConfigError(
                    f"the sum of these adapters holds {int((~parameter.isfinite()).sum())} values that are infinite or "
                    f"NaN: {parameter.dtype} holds numbers up to {torch.finfo(parameter.dtype).max:.4g}. Give smaller "
                    "weights, or adapters with a wider values_dtype."
                )


def check_names(tuner: BaseTuner, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """Refuse adapters that are not there, weights that are not one finite number for each, and a name that is taken."""
    known = sorted(tuner.peft_config)
    unknown = [name for name in adapters if name not in tuner.peft_config]
    if unknown or not adapters:
        raise ConfigError(f"adapters must name adapters of this model, got {adapters}. It has {known}.")
    check_factors(weights, len(adapters))
    if adapter_name in tuner.peft_config:
        raise ConfigError(
            f"adapter_name {adapter_name!r} is taken; this model has {known}. Delete it first, or choose another name."
        )


def choose_head(tuner: BaseTuner, adapters: list[str], head_from: str | None) -> str | None:
    """The adapter whose heads and token rows a new one gets: `head_from`, the only one that has any, or None."""
    having = [name for name in dict.fromkeys(adapters) if _has_head(tuner.peft_config[name])]
    if head_from is not None:
        if head_from not in having:
            raise ConfigError(
                f"head_from must be one of the combined adapters that have heads ({having}), got {head_from!r}."
            )
        return head_from
    if len(having) > 1:
        raise ConfigError(
            f"the adapters {having} all have heads or token rows of their own (modules_to_save, "
            "trainable_token_indices): say whose to keep with head_from=..."
        )
    return having[0] if having else None


def _has_head(config: PeftConfig) -> bool:
    return bool(config.modules_to_save or getattr(config, "trainable_token_indices", None))


def copy_heads(tuner: BaseTuner, source: str, target: str) -> None:
    """Give one adapter the heads of another, and its rows of trained tokens."""
    for module in tuner.model.modules():
        if isinstance(module, ModulesToSaveWrapper) and source in module.modules_to_save:
            module.modules_to_save[target].load_state_dict(module.modules_to_save[source].state_dict())
        elif isinstance(module, AuxiliaryTrainingWrapper) and hasattr(module, "token_adapter"):
            rows = module.token_adapter.trainable_tokens_delta
            if source in rows:
                rows[target].data.copy_(rows[source].data)


def inherited(tuner: BaseTuner, adapters: Sequence[str], head: str | None) -> dict[str, Any]:
    """Fields of the new adapter's config that the combined ones have already; `head` is whose heads it gets."""
    first = tuner.peft_config[adapters[0]]
    tokens = getattr(tuner.peft_config[head], "trainable_token_indices", None) if head else None
    return {
        **({} if tokens is None else {"trainable_token_indices": copy.deepcopy(tokens)}),
        "modules_to_save": tuner.peft_config[head].modules_to_save if head else None,
        "task_type": tuner.peft_config[head].task_type if head else first.task_type,
        "base_model_name_or_path": first.base_model_name_or_path,
        "revision": first.revision,
    }

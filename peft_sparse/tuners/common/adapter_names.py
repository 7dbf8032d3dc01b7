"""Which names an adapter can have: they become keys of torch's containers, parts of tensor names, and folders."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence

from peft import PeftConfig
from torch import nn

from ...core.names import SLOTS, is_trained_whole, unwrapped
from ...errors import ConfigError
from .mixed_batches import BASE

_TRY = "Give the adapter another name, such as 'default', 'quy' or 'task_ner'."


def check_adapter_name(name: object, configs: Iterable[PeftConfig] = ()) -> None:
    """Refuse a name that an adapter cannot have, before the model is touched.

    Args:
        name: the adapter's name.
        configs: of all adapters of the model, the new one included.

    Raises:
        ConfigError: torch's containers have no place for it, its tensors or its folder would be another thing's, or it
            would be taken for a module that `modules_to_save` or `trainable_token_indices` names.
    """
    if not isinstance(name, str) or not name or "." in name:
        raise ConfigError(f"adapter_name must be a string without a dot, and not empty, got {name!r}. {_TRY}")
    if name == BASE or name == "_extra_state" or not unwrapped(name):
        raise ConfigError(f"adapter_name {name!r} has a meaning of its own in PEFT or torch. {_TRY}")
    if os.path.isabs(name) or "\\" in name or "\0" in name:
        raise ConfigError(f"adapter_name {name!r} is a path, and an adapter is saved in a folder of its name. {_TRY}")
    configs = list(configs)
    holders: list[nn.Module] = [nn.ModuleDict()]
    if any(getattr(config, "trainable_token_indices", None) for config in configs):
        holders.append(nn.ParameterDict())
    for holder in holders:
        if hasattr(holder, name):
            raise ConfigError(
                f"adapter_name {name!r} is an attribute of torch's {type(holder).__name__}, which holds adapters by "
                f"their names. {_TRY}"
            )
    for target in _trained_whole(configs):
        # PEFT looks for these modules by the ends of paths, and would find the adapter's own.
        if any(is_trained_whole(f"{slot}.{name}", [target]) for slot in SLOTS):
            raise ConfigError(
                f"adapter_name {name!r} ends like {target!r}, a module that modules_to_save or trainable_token_indices "
                f"of this model names: PEFT would take the adapter for it. {_TRY}"
            )


def _trained_whole(configs: list[PeftConfig]) -> list[str]:
    """Ends of paths of the modules that PEFT is to train beside the adapters."""
    found: list[str] = []
    for config in configs:
        tokens = getattr(config, "trainable_token_indices", None)
        found += [*(getattr(config, "modules_to_save", None) or ()), *(tokens if isinstance(tokens, dict) else ())]
    return found


def known_names(names: str | Sequence[str] | None, known: Collection[str]) -> list[str] | None:
    """The adapters that a verb was asked for, in order and each once; None (the active ones) comes back as it is.

    Args:
        names: one name or several.
        known: the adapters of the model.

    Raises:
        ConfigError: the model has no such adapter. PEFT's layers would do nothing for it, and say nothing.
    """
    if names is None:
        return None
    asked = list(dict.fromkeys([names] if isinstance(names, str) else names))
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ConfigError(f"adapter {unknown[0]!r} is not in the model, which has {list(known)}.")
    return asked


def known_list(names: Sequence[str] | None, known: Collection[str]) -> list[str] | None:
    """`known_names` for verbs that PEFT wants a list for.

    Raises:
        TypeError: it is a single string.
    """
    if isinstance(names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {names!r}.")
    return known_names(names, known)

"""Checks of fields that the configs of all tuner types share: a file may hold anything in them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ...checks import check_flag, check_layers, check_modules, shortened
from ...errors import ConfigError
from ...selection.patterns import check_pattern

# Strings in `target_modules` that mean something else than a regular expression.
ALL_PARAMETERS = "all"
ALL_LINEAR = "all-linear"


def check_shared_fields(config: Any) -> None:
    """Check the fields that say where an adapter goes and what is saved with it; one head's name becomes a list of it.

    Args:
        config: a config; fields that it does not have are left out.

    Raises:
        ConfigError: a field holds something that it cannot.
    """
    if isinstance(getattr(config, "modules_to_save", None), str):
        config.modules_to_save = [config.modules_to_save]
    for name in ("target_modules", "exclude_modules", "invertible_module", "layers_pattern"):
        value = getattr(config, name, None)
        check_modules(name, value)
        if isinstance(value, str) and value not in (ALL_PARAMETERS, ALL_LINEAR):
            check_pattern(f"{name}:", value)
    for name in ("modules_to_save", "target_parameters"):
        value = getattr(config, name, None)
        if value is not None and not _is_all(value, str):
            raise ConfigError(f"{name} must be a list of names, got {shortened(value)}.")
    for name in ("layers_to_transform", "leave_out"):
        check_layers(name, getattr(config, name, None))
    check_flag("init_weights", getattr(config, "init_weights", True))
    tokens = getattr(config, "trainable_token_indices", None)
    rows = list(tokens.values()) if isinstance(tokens, dict) else [] if tokens is None else [tokens]
    if not all(_is_all(one, int) and all(0 <= index < 2**31 for index in one) for one in rows):
        raise ConfigError(
            f"trainable_token_indices must be a list of rows of the embedding, or one for each embedding, got "
            f"{shortened(tokens)}."
        )
    if not all(len(one) for one in rows):
        raise ConfigError(
            f"trainable_token_indices must name at least one row, got {shortened(tokens)}. To train no rows beside the "
            "adapter, leave it out."
        )


def _is_all(values: object, kind: type) -> bool:
    return (
        isinstance(values, (Collection, range))
        and not isinstance(values, (str, bytes, dict))
        and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
    )

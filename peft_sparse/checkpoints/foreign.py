"""Adapters of other libraries, recognised by what lies in their folders, and the way that each of them comes in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

# The one file of an adapter of composable-sft, and of BiStil, which stores its task adapters the same way.
COMPOSABLE_SFT = "pytorch_diff.bin"

_IMPORT = "Convert it first: peft-sparse import {where} -o OUTPUT (or import_adapter), and give the result."
# {peft_type of forks of PEFT: whose}
_FORKS = {"SFT": "the SpIEL fork of PEFT", "ROSA": "RoSA (the peft-rosa fork of PEFT)"}


def is_adapter_hub(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is one of the `adapters` library or adapter-transformers."""
    return "peft_type" not in config and isinstance(config.get("config"), (Mapping, str)) and "name" in config


def way_in(where: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> str | None:
    """What an adapter of another library is, and which function or command reads it.

    Args:
        where: the folder or id that was given, for the message.
        config: the content of its adapter_config.json; None says that there is none, but a `COMPOSABLE_SFT` file.

    Returns:
        two sentences for an error; None for an adapter of PEFT's.
    """
    given = os.fspath(where)
    if config is None:
        return (
            f"'{given}' holds {COMPOSABLE_SFT}, a sparse adapter of composable-sft or BiStil. "
            f"{_IMPORT.format(where=given)}"
        )
    if is_adapter_hub(config):
        return (
            f"'{given}' is an adapter of AdapterHub (the adapters library or adapter-transformers). "
            f"Load it with load_adapter_hub(model, {given!r})."
        )
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind in _FORKS:
        return f"'{given}' is an adapter of {_FORKS[kind]} (peft_type {kind!r}). {_IMPORT.format(where=given)}"
    return None

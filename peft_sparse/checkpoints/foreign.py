"""Adapters of other libraries, recognised by the files in their folders, and what an error says of how to use them."""

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


def how_to_import(where: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> str | None:
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


_WITH_PEFT = "PeftModel.from_pretrained(...), merge_and_unload()"
_AS_DIFFERENCE = (
    "Make a sparse adapter of it: peft-sparse diff BASE {where} -o OUTPUT (or extract_adapter); or merge it with PEFT: "
    f"{_WITH_PEFT}, save_pretrained(...)."
)
# {peft_type: what to do with it where a sparse adapter is wanted}
_USES = {
    "BOTTLENECK": "A bottleneck adapter computes beside the weights, so no checkpoint of the base model can hold it. "
    f"Load it with PEFT; {_WITH_PEFT} builds it into the model in memory.",
    "MAD_G": "MAD-G generates bottleneck adapters, which compute beside the weights. Load it with PEFT; "
    "generate_adapter(model, LANGUAGE) gives the adapter of a language.",
    "ADA_SFT": "Load it with PEFT: sparse_from_ada(model, density=..., save_directory=...) makes its largest changes a "
    f"sparse adapter; or merge all of it: {_WITH_PEFT}, save_pretrained(...).",
    "LORA": _AS_DIFFERENCE,
    "SHIRA": _AS_DIFFERENCE,
    "SUPERTUNING": _AS_DIFFERENCE,
}


def how_to_use(where: str | os.PathLike[str], kind: Any) -> str:
    """What can be done with an adapter of another type of PEFT's or of ours where a sparse one is wanted.

    Args:
        where: the folder or id that was given.
        kind: its peft_type.
    """
    known = _USES.get(kind) if isinstance(kind, str) else None
    return (known or f"Others can be used with PEFT: {_WITH_PEFT}.").format(where=os.fspath(where))

"""The model card of MAD-G adapters: how to load one, which languages it knows, and where their vectors come from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .card import DEFAULT, README, loading_snippet, write_block


def madg_card_text(config: Mapping[str, Any], *, subfolder: str | None = None) -> str:
    """The library's part of the card, in markdown; its first lines load the adapter.

    Args:
        config: the adapter's configuration (`config.to_dict()`).
        subfolder: folder of the repository that the adapter lies in, None for its root.
    """
    typology = config.get("saved_typology") or {}
    languages = sorted(typology.get("vectors", {}))
    layer_dim = config.get("layer_dim")
    shown = f", layer embedding {layer_dim} (MAD-G-LS)" if layer_dim else ""
    source = f"{typology.get('source', 'unknown')} {typology.get('version') or ''}".strip()
    count = len(typology.get("feature_names", ()))
    facts = [
        f"Generates: `{config.get('kind')}` adapters, bottleneck size {config.get('bottleneck_size')}",
        f"Language embedding {config.get('language_dim')}{shown}",
        f"Languages whose vectors are saved with it: {', '.join(languages) or 'none'}",
        f"Typological vectors: {count} features of {source}, under that source's licence",
    ]
    return "\n".join(
        [
            *loading_snippet(config, subfolder=subfolder)[:-1],
            f'model.set_language("{languages[0] if languages else "<language>"}")',
            "```",
            "",
            f"## MAD-G{f': {subfolder}' if subfolder else ''}",
            "",
            "A hypernetwork that generates bottleneck adapters of a language from its typological vector. The base "
            "model's own weights stay as they are.",
            "",
            *(f"- {fact}" for fact in facts),
        ]
    )


def update_madg_card(
    directory: str | os.PathLike[str], config: Mapping[str, Any], *, adapter_name: str = DEFAULT
) -> None:
    """Write the library's part into the model card of a saved adapter, and keep everything else that stands there.

    Args:
        directory: where the adapter was saved.
        config: the adapter's configuration (`config.to_dict()`).
        adapter_name: the name under which it was saved; see `card.update_card` for what it does.
    """
    folder = Path(directory)
    tags = ["peft-sparse", "mad-g", "bottleneck-adapter"]
    write_block(folder, madg_card_text(config), config, tags=tags)
    if adapter_name != DEFAULT and folder.name == adapter_name and (folder.parent / README).is_file():
        text = madg_card_text(config, subfolder=adapter_name)
        write_block(folder.parent, text, config, tags=tags, subfolder=adapter_name)

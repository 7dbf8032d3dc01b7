"""The model card of bottleneck adapters: how to load one, and what it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .card import DEFAULT, README, loading_snippet, write_block


def bottleneck_card_text(config: Mapping[str, Any], *, subfolder: str | None = None) -> str:
    """The library's part of the card, in markdown; its first lines load the adapter.

    Args:
        config: the adapter's configuration (`config.to_dict()`).
        subfolder: folder of the repository that the adapter lies in, None for its root.
    """
    size = config.get("bottleneck_size")
    inside = f"bottleneck size {size}" if size else f"reduction factor {config.get('reduction_factor') or 16}"
    heads = config.get("modules_to_save")
    facts = [
        f"Kind: `{config.get('kind')}`, {inside}, activation `{config.get('activation')}`",
        f"Invertible adapter of the embeddings: {config.get('invertible') or 'none'}",
        *([f"Trained whole and saved with it: {', '.join(f'`{head}`' for head in sorted(heads))}"] if heads else []),
    ]
    return "\n".join(
        [
            *loading_snippet(config, subfolder=subfolder),
            "",
            f"## Bottleneck adapter{f': {subfolder}' if subfolder else ''}",
            "",
            "This adapter adds small modules to the layers of a base model, whose own weights it leaves as they are.",
            "",
            *(f"- {fact}" for fact in facts),
        ]
    )


def update_bottleneck_card(
    directory: str | os.PathLike[str], config: Mapping[str, Any], *, adapter_name: str = DEFAULT
) -> None:
    """Write the library's part into the model card of a saved adapter, and keep everything else that stands there.

    Args:
        directory: where the adapter was saved.
        config: the adapter's configuration (`config.to_dict()`).
        adapter_name: the name under which it was saved; see `card.update_card` for what it does.
    """
    folder = Path(directory)
    tags = ["peft-sparse", "bottleneck-adapter", str(config.get("kind"))]
    write_block(folder, bottleneck_card_text(config), config, tags=tags)
    if adapter_name != DEFAULT and folder.name == adapter_name and (folder.parent / README).is_file():
        text = bottleneck_card_text(config, subfolder=adapter_name)
        write_block(folder.parent, text, config, tags=tags, subfolder=adapter_name)

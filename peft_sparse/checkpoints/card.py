"""The model card: its text as a pure function of config and counts, and a writer that keeps what others wrote."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ..files import write_atomically
from .card_layers import layer_table, sizes_in_file
from .card_rows import base_named, is_hub_id, plain, row_of
from .card_template import without_empty_sections
from .native import SOURCE
from .tasks import BASE_CLASSES

logger = logging.getLogger(__name__)

README = "README.md"
DEFAULT = "default"


def card_text(
    config: Mapping[str, Any], *, sizes: Mapping[str, int] | None = None, subfolder: str | None = None
) -> str:
    """The library's part of a model card, in markdown; its first lines load the adapter.

    Args:
        config: the adapter's configuration (`config.to_dict()`), with `counts` filled in if it is a sparse one.
        sizes: number of elements of each tuned parameter; None leaves the densities out.
        subfolder: folder of the repository that the adapter lies in, None for its root.

    Raises:
        KeyError: the adapter is of no type of this library.
    """
    row = row_of(config)
    if row is None:
        raise KeyError(plain(config.get("peft_type")))
    facts = row.facts(config, sizes)
    if heads := config.get("modules_to_save"):
        facts.append(f"Trained whole and saved with it: {', '.join(f'`{head}`' for head in sorted(heads))}")
    return "\n".join(
        [
            *loading_snippet(config, subfolder=subfolder),
            "",
            f"## {row.title}{f': {subfolder}' if subfolder else ''}",
            "",
            row.text,
            "",
            *(f"- {fact}" for fact in facts),
            *(["", layer_table(config["counts"], sizes)] if row.has_layers else []),
        ]
    )


def loading_snippet(config: Mapping[str, Any], *, subfolder: str | None = None) -> list[str]:
    """The lines of markdown that show how to load an adapter.

    Args:
        config: the adapter's configuration (`config.to_dict()`).
        subfolder: folder of the repository that the adapter lies in, None for its root.
    """
    base, comment = base_named(config)
    row = row_of(config)
    base_class = BASE_CLASSES.get(plain(config.get("task_type")), "AutoModel")
    place = f', subfolder="{subfolder}"' if subfolder else ""
    return [
        "```python",
        "import peft_sparse  # pip install peft-sparse; registers the adapter type with PEFT",
        "from peft import PeftModel",
        f"from transformers import {base_class}",
        "",
        f'base = {base_class}.from_pretrained("{base}"){comment}',
        f'model = PeftModel.from_pretrained(base, "<this repository or folder>"{place})',
        *(row.usage(config) if row is not None else []),
        "```",
    ]


def card_tags(config: Mapping[str, Any]) -> list[str]:
    """Tags for the Hub: the library, the family, the method, and the base model if its name is one on the Hub."""
    row = row_of(config)
    return ["peft-sparse", *(row.tags(config) if row is not None else []), *_base_tags(config)]


def _base_tags(config: Mapping[str, Any]) -> list[str]:
    base = config.get("base_model_name_or_path")
    return [f"base_model:adapter:{base}"] if is_hub_id(base) else []


def _names_a_folder(tag: str) -> bool:
    kind, _, base = tag.rpartition(":")
    return kind.startswith("base_model") and not is_hub_id(base)


def update_card(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    sizes: Mapping[str, int] | None = None,
    adapter_name: str = DEFAULT,
) -> None:
    """Write the library's part into the model card of a saved adapter, and keep everything else that is there.

    The part is between two comments, so that saving again replaces it. PEFT saves an adapter that is not called
    "default" into a folder of that name; its part then also goes into the card one level up, which the Hub shows.

    Args:
        directory: where the adapter was saved.
        config: the adapter's configuration (`config.to_dict()`); a sparse one without `counts`, or a
            type of another library, writes nothing.
        sizes: number of elements of each tuned parameter; None reads them from the adapter file if it is there.
        adapter_name: the name under which the adapter was saved.

    A card that cannot be understood is left as it is, with a warning: trained weights must not be lost over it.
    """
    row, counts = row_of(config), config.get("counts")
    if row is None or (row.has_layers and not counts):
        return
    folder = Path(directory)
    if sizes is None and row.has_layers:
        sizes = sizes_in_file(folder / SOURCE, counts)
    tags = card_tags(config)
    write_block(folder, card_text(config, sizes=sizes), config, tags=tags)
    if adapter_name != DEFAULT and folder.name == adapter_name and (folder.parent / README).is_file():
        text = card_text(config, sizes=sizes, subfolder=adapter_name)
        write_block(folder.parent, text, config, tags=tags, subfolder=adapter_name)


def write_block(
    folder: Path, block: str, config: Mapping[str, Any], *, tags: Sequence[str], subfolder: str | None = None
) -> None:
    """Write the library's part into the card of a folder, new or not.

    Args:
        folder: where the card lies or will lie.
        block: the part, in markdown.
        config: the adapter's configuration, for the base model's name.
        tags: tags for the Hub, added to those that are there.
        subfolder: where the part's adapter lies, None for `folder` itself.
    """
    path = folder / README
    card = read_card(path)
    if card is None:
        return
    others = [tag for tag in card.data.tags if not _names_a_folder(tag)]
    card.data.tags = sorted({*others, *tags, *_base_tags(config)})
    base = config.get("base_model_name_or_path")
    # PEFT writes what the base model was loaded from: a folder of this machine says nothing to anybody else.
    if isinstance(card.data.base_model, str) and not is_hub_id(card.data.base_model):
        card.data.base_model = None
    if card.data.base_model is None and is_hub_id(base):
        card.data.base_model = base
    card.data.library_name = "peft"  # as PEFT does; a card that transformers made says "transformers"
    card.text = place_block(without_empty_sections(card.text), block, subfolder=subfolder)
    write_atomically(path, str(card).encode())


def read_card(path: Path) -> ModelCard | None:
    """The card in a file, with a list of tags, or a new one; None, with a warning, if it cannot be understood."""
    try:
        card = ModelCard(path.read_bytes().decode("utf-8-sig") if path.is_file() else "---\nlibrary_name: peft\n---\n")
        tags = card.data.tags or []
        card.data.tags = sorted({tags} if isinstance(tags, str) else set(tags))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        logger.warning("The model card %s was left as it is: its metadata cannot be read (%s).", path, error)
        return None
    return card


def place_block(text: str, block: str, *, subfolder: str | None = None) -> str:
    """Put the library's part into the body of a card: in place of its predecessor, else at the top.

    Args:
        text: the body, without the metadata.
        block: the part, as `card_text` gives it.
        subfolder: where the part's adapter lies; None for the root, whose part stays above those of subfolders.
    """
    line_break = "\r\n" if "\r\n" in text else "\n"
    name = f" {subfolder}" if subfolder else ""
    begin, end = f"<!-- peft-sparse:begin{name} (saving writes this part anew) -->", f"<!-- peft-sparse:end{name} -->"
    block = f"{begin}\n{block}\n{end}".replace("\n", line_break)
    start, stop = text.find(begin), text.find(end)
    if 0 <= start < stop:
        return (text[:start] + block + text[stop + len(end) :]).rstrip("\r\n") + line_break
    root_end = "<!-- peft-sparse:end -->"
    split = text.find(root_end) + len(root_end) if subfolder and root_end in text else 0
    before, after = text[:split].rstrip(), text[split:].strip("\r\n")
    return (line_break * 2).join(part for part in (before, block, after) if part) + line_break

"""The model card: its text as a pure function of config and counts, and a writer that keeps what others wrote."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

from ..core.gaps import read_header
from ..errors import FormatError
from ..files import write_atomically
from ..selection.anatomy import PARTS, place_of
from .card_template import without_empty_sections
from .native import SOURCE, canonical_name, parameter_of, tensor_names
from .tasks import BASE_CLASSES

logger = logging.getLogger(__name__)

README = "README.md"
_SPARSE_TEXT = (
    "This adapter changes a few of the base model's own weights: it says which ones, and what to add to each."
)
_ADA_SFT_TEXT = "This adapter multiplies the base model's own linear weights by soft masks, or adds to them, or both."
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
DEFAULT = "default"


def layer_table(counts: Mapping[str, int], sizes: Mapping[str, int] | None = None) -> str:
    """A markdown table of tuned weights: a row per layer (equal neighbours share one), a column per part.

    Args:
        counts: tuned weights by parameter name.
        sizes: number of elements of each of these parameters, for the densities; None leaves the densities out.
    """
    rows: dict[tuple[str, int], dict[str, list[str]]] = {}
    for parameter in counts:
        place = place_of(parameter)
        row = (place.stack, -1 if place.layer is None else place.layer)
        rows.setdefault(row, {}).setdefault(place.part, []).append(parameter)
    parts = [part for part in PARTS if any(part in row for row in rows.values())]

    def cells(groups: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        columns = [groups.get(part, ()) for part in parts]
        everything = [parameter for column in columns for parameter in column]
        return tuple(_cell(column, counts, sizes) for column in [*columns, everything])

    header = ["layer", *parts, "all"]
    lines = [header, ["---", *(["---:"] * (len(header) - 1))]]
    for label, row in _merged((place, cells(rows[place])) for place in sorted(rows)):
        lines.append([label, *row])
    if len(rows) > 1:
        lines.append(["total", *cells({part: [p for p in counts if place_of(p).part == part] for part in parts})])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(parameters: Sequence[str], counts: Mapping[str, int], sizes: Mapping[str, int] | None) -> str:
    if not parameters:
        return ""
    count = sum(counts[name] for name in parameters)
    size = sum(sizes[name] for name in parameters) if sizes else 0
    return f"{count:,} ({count / size:.2%})" if size else f"{count:,}"


def _merged(rows: Iterable[tuple[tuple[str, int], tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """Label the rows; a run of layers with equal cells becomes one row."""
    runs: list[tuple[str, int, int, tuple[str, ...]]] = []
    for (stack, index), cells in rows:
        if runs and runs[-1][0] == stack and runs[-1][2] == index - 1 and runs[-1][3] == cells and index > 0:
            runs[-1] = (stack, runs[-1][1], index, cells)
        else:
            runs.append((stack, index, index, cells))
    labelled = []
    for stack, first, last, cells in runs:
        if first < 0:
            label = "outside the layers"
        else:
            label = f"`{stack}.{first}`" if first == last else f"`{stack}.{first}` to `{last}`, each"
        labelled.append((label, cells))
    return labelled


def card_text(
    config: Mapping[str, Any], *, sizes: Mapping[str, int] | None = None, subfolder: str | None = None
) -> str:
    """The library's part of a model card, in markdown; its first lines load the adapter.

    Args:
        config: the adapter's configuration (`config.to_dict()`), with `counts` filled in if it is a sparse one.
        sizes: number of elements of each tuned parameter; None leaves the densities out.
        subfolder: folder of the repository that the adapter lies in, None for its root.
    """
    heads = config.get("modules_to_save")
    facts = _mask_facts(config) if _is_ada_sft(config) else _sparse_facts(config, sizes)
    if heads:
        facts.append(f"Trained whole and saved with it: {', '.join(f'`{head}`' for head in sorted(heads))}")
    return "\n".join(
        [
            *loading_snippet(config, subfolder=subfolder),
            "",
            f"## Sparse fine-tuning{f': {subfolder}' if subfolder else ''}",
            "",
            _ADA_SFT_TEXT if _is_ada_sft(config) else _SPARSE_TEXT,
            "",
            *(f"- {fact}" for fact in facts),
            *([] if _is_ada_sft(config) else ["", layer_table(config["counts"], sizes)]),
        ]
    )


def loading_snippet(config: Mapping[str, Any], *, subfolder: str | None = None) -> list[str]:
    """The lines of markdown that show how to load an adapter.

    Args:
        config: the adapter's configuration (`config.to_dict()`).
        subfolder: folder of the repository that the adapter lies in, None for its root.
    """
    base, comment = base_named(config)
    base_class = BASE_CLASSES.get(_plain(config.get("task_type")), "AutoModel")
    place = f', subfolder="{subfolder}"' if subfolder else ""
    return [
        "```python",
        "import peft_sparse  # pip install peft-sparse; registers the adapter type with PEFT",
        "from peft import PeftModel",
        f"from transformers import {base_class}",
        "",
        f'base = {base_class}.from_pretrained("{base}"){comment}',
        f'model = PeftModel.from_pretrained(base, "<this repository or folder>"{place})',
        "```",
    ]


def base_named(config: Mapping[str, Any]) -> tuple[str, str]:
    """(what a card calls the base model, a comment behind it): of a folder of this machine nothing but its name."""
    base = config.get("base_model_name_or_path")
    if not base:
        return "<base model>", ""
    return (base, "") if _is_hub_id(base) else (Path(base).name, "  # a folder: the model it was trained on")


def _is_ada_sft(config: Mapping[str, Any]) -> bool:
    return _plain(config.get("peft_type")) == "ADA_SFT"


def _sparse_facts(config: Mapping[str, Any], sizes: Mapping[str, int] | None) -> list[str]:
    counts: Mapping[str, int] = config["counts"]
    total, size = sum(counts.values()), sum(sizes.values()) if sizes else 0
    share = f", {total / size:.2%} of their elements" if size else ""
    return [
        f"Method: `{_plain(config.get('method'))}`{_criterion(config)}",
        *([f"Denoised before the choice: {_denoising(config)}"] if config.get("method") == "deft_x" else []),
        f"Density: {_request(config)}",
        f"Budget: {_budget(config.get('budget'))}",
        f"Tuned weights: {total:,} in {len(counts)} tensors{share}",
        *_origin(config.get("provenance")),
    ]


def _mask_facts(config: Mapping[str, Any]) -> list[str]:
    kind = "divided by its start" if config.get("from_identity") else "as it is"
    return [
        "Method: `ada_sft`",
        f"Phase: `{config.get('phase')}`",
        f"Mask: sigmoid, from {config.get('initial_mask')} on, {kind}",
    ]


def _origin(provenance: Mapping[str, Any] | None) -> list[str]:
    """Where an adapter comes from that was taken out of a tuned model, or imported, instead of trained."""
    if provenance and "imported_from" in provenance:
        return _import(provenance)
    if not provenance or "tuned" not in provenance:
        return []
    revision = f" ({provenance['tuned_revision']})" if provenance.get("tuned_revision") else ""
    share = (
        f", which hold {provenance['share_kept']:.1%} of the squared difference" if "share_kept" in provenance else ""
    )
    tuned = provenance["tuned"] if _is_hub_id(provenance["tuned"]) else Path(provenance["tuned"]).name
    origin = f"Extracted without training from `{tuned}`{revision}"
    return [f"{origin}: the weights that rank highest by `{provenance.get('criterion')}`{share}"]


def _import(provenance: Mapping[str, Any]) -> list[str]:
    """Where an adapter comes from that another library made."""
    revision = f" ({provenance['revision']})" if provenance.get("revision") else ""
    facts = [
        f"Imported from `{provenance['imported_from']}`{revision}, an adapter of {provenance.get('format')}; SHA-256 "
        f"of the original file: `{provenance.get('sha256')}`"
    ]
    if labels := provenance.get("labels"):
        facts.append(f"Labels, in the order of their ids: {', '.join(labels)}")
    if left_out := provenance.get("left_out"):
        facts.append(f"Not imported: {', '.join(f'`{name}`' for name in left_out)}")
    return facts


def _plain(value: Any) -> str:
    """Text of a string or of an enum member."""
    return str(getattr(value, "value", value))


def _criterion(config: Mapping[str, Any]) -> str:
    criterion = config.get("criterion")
    return f", by the criterion `{_plain(criterion)}`" if criterion is not None else ""


def _request(config: Mapping[str, Any]) -> str:
    if config.get("density") is not None:
        whole = "the model" if config.get("density_of") == "model" else "the targeted tensors"
        return f"{config['density']} of the weights of {whole}"
    if config.get("equivalent_rank") is not None:
        return f"as many weights as LoRA of rank {config['equivalent_rank']}"
    if config.get("num_weights") is not None:
        return f"{config['num_weights']:,} weights"
    return "as given"


def _denoising(config: Mapping[str, Any]) -> str:
    rank = config.get("rank")
    meaning = "directions of each matrix" if isinstance(rank, int) else "of the squared singular values of each matrix"
    embeddings = "embeddings too" if config.get("denoise_embeddings") else "embeddings as they were"
    return f"rank {rank} ({meaning}), residual density {config.get('residual_density')}, {embeddings}"


def _budget(budget: Any) -> str:
    if not isinstance(budget, Mapping):
        return f"`{_plain(budget)}`"
    return ", ".join(f"`{pattern}`: {share:.2%}" for pattern, share in budget.items())


def card_tags(config: Mapping[str, Any]) -> list[str]:
    """Tags for the Hub: the library, the family, the method, and the base model if its name is one on the Hub."""
    method = "ada_sft" if _is_ada_sft(config) else _plain(config.get("method"))
    tags = ["peft-sparse", "sparse-fine-tuning", method.replace("_", "-")]
    return [*tags, *_base_tags(config)]


def _base_tags(config: Mapping[str, Any]) -> list[str]:
    base = config.get("base_model_name_or_path")
    return [f"base_model:adapter:{base}"] if _is_hub_id(base) else []


def _is_hub_id(name: Any) -> bool:
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None and not os.path.exists(name)


def _names_a_folder(tag: str) -> bool:
    kind, _, base = tag.rpartition(":")
    return kind.startswith("base_model") and not _is_hub_id(base)


def update_card(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    sizes: Mapping[str, int] | None = None,
    adapter_name: str = DEFAULT,
) -> None:
    """Write the library's part into the model card of a saved adapter, and keep everything else that stands there.

    The part stands between two comments, so that saving again replaces it. PEFT saves an adapter that is not called
    "default" into a folder of that name; its part then also goes into the card one level up, which the Hub shows.

    Args:
        directory: where the adapter was saved.
        config: the adapter's configuration (`config.to_dict()`); a sparse one without `counts` writes nothing.
        sizes: number of elements of each tuned parameter; None reads them from the adapter file if it is there.
        adapter_name: the name under which the adapter was saved.

    A card that cannot be understood is left as it is, with a warning: trained weights must not be lost over it.
    """
    counts = config.get("counts")
    if not counts and not _is_ada_sft(config):
        return
    folder = Path(directory)
    if sizes is None and counts:
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
    try:
        existing = path.read_bytes().decode("utf-8-sig") if path.is_file() else "---\nlibrary_name: peft\n---\n"
        card = ModelCard(existing)
        old = card.data.tags or []
        others = [tag for tag in ([old] if isinstance(old, str) else old) if not _names_a_folder(tag)]
        card.data.tags = sorted({*others, *tags, *_base_tags(config)})
    except (ValueError, TypeError, yaml.YAMLError) as error:
        logger.warning("The model card %s was left as it is: its metadata cannot be read (%s).", path, error)
        return
    base = config.get("base_model_name_or_path")
    # PEFT writes what the base model was loaded from: a folder of this machine says nothing to anybody else.
    if isinstance(card.data.base_model, str) and not _is_hub_id(card.data.base_model):
        card.data.base_model = None
    if card.data.base_model is None and _is_hub_id(base):
        card.data.base_model = base
    card.data.library_name = "peft"  # as PEFT does; a card that transformers made says "transformers"
    card.text = place_block(without_empty_sections(card.text), block, subfolder=subfolder)
    write_atomically(path, str(card).encode())


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


def sizes_in_file(path: Path, counts: Mapping[str, int]) -> dict[str, int] | None:
    """Number of elements of each tuned parameter, from the headers in an adapter file.

    None if the file does not have these counts: transformers writes the config before the weights, so that it may be an
    older one.
    """
    if not path.is_file():
        return None
    sizes: dict[str, int] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                name = canonical_name(key)
                parameter = parameter_of(name)
                if parameter is None or name != tensor_names(parameter)[1]:
                    continue
                header = read_header(file.get_tensor(key), name=name)
                if counts.get(parameter) != header.count:
                    return None
                sizes[parameter] = _product(header.shape)
    except (SafetensorError, FormatError):
        return None
    return sizes if sizes.keys() == counts.keys() else None


def _product(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size

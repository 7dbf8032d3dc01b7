"""What a model card says of each tuner type, and of single methods: rows of one table."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

# {method of a sparse adapter: what else its card says, of the config as a dictionary}; configs register theirs.
METHOD_FACTS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {}


@dataclass(frozen=True)
class Row:
    """The card of a tuner type. Functions take the adapter's config as a dictionary (`config.to_dict()`).

    Attributes:
        title: its heading.
        text: one or two sentences on what such an adapter is.
        facts: (config, number of elements by parameter or None) -> the lines of its list.
        tags: for the Hub.
        usage: lines of code that come after the adapter is loaded.
        has_layers: whether it is an adapter with `counts`, which a table shows by layer.
    """

    title: str
    text: str
    facts: Callable[[Mapping[str, Any], Mapping[str, int] | None], list[str]]
    tags: Callable[[Mapping[str, Any]], list[str]]
    usage: Callable[[Mapping[str, Any]], list[str]] = lambda config: []
    has_layers: bool = False


def row_of(config: Mapping[str, Any]) -> Row | None:
    """The row of an adapter's tuner type; None for a type that is not of this library."""
    return ROWS.get(plain(config.get("peft_type", "SPARSE_FT")))


def plain(value: Any) -> str:
    """Text of a string or of an enum member."""
    return str(getattr(value, "value", value))


def base_named(config: Mapping[str, Any]) -> tuple[str, str]:
    """(what a card calls the base model, a comment behind it): of a folder of this machine nothing but its name."""
    base = config.get("base_model_name_or_path")
    if not base:
        return "<base model>", ""
    return (base, "") if is_hub_id(base) else (Path(base).name, "  # a folder: the model it was trained on")


def is_hub_id(name: Any) -> bool:
    """Whether a base model's name is one on the Hub, and not a folder of this machine."""
    return isinstance(name, str) and _HUB_ID.fullmatch(name) is not None and not os.path.exists(name)


# ---- sparse adapters -----------------------------------------------------------------------------


def _sparse_facts(config: Mapping[str, Any], sizes: Mapping[str, int] | None) -> list[str]:
    counts: Mapping[str, int] = config["counts"]
    total, size = sum(counts.values()), sum(sizes.values()) if sizes else 0
    method = plain(config.get("method"))
    share = f", {total / size:.2%} of their elements" if size else ""
    return [
        f"Method: `{method}`{_criterion(config)}",
        *(METHOD_FACTS[method](config) if method in METHOD_FACTS else []),
        f"Density: {_request(config)}",
        f"Budget: {_budget(config.get('budget'))}",
        f"Tuned weights: {total:,} in {len(counts)} tensors{share}",
        *_origin(config.get("provenance")),
    ]


def _criterion(config: Mapping[str, Any]) -> str:
    criterion, share = config.get("criterion"), config.get("random_share")
    drawn = f", with {share:.0%} of the weights drawn at random beside them" if share else ""
    return f", by the criterion `{plain(criterion)}`{drawn}" if criterion is not None else ""


def _request(config: Mapping[str, Any]) -> str:
    if config.get("density") is not None:
        whole = "the model" if config.get("density_of") == "model" else "the targeted tensors"
        return f"{config['density']} of the weights of {whole}"
    if config.get("equivalent_rank") is not None:
        return f"as many weights as LoRA of rank {config['equivalent_rank']}"
    if config.get("num_weights") is not None:
        return f"{config['num_weights']:,} weights"
    return "as given"


def _budget(budget: Any) -> str:
    if not isinstance(budget, Mapping):
        return f"`{plain(budget)}`"
    return ", ".join(f"`{pattern}`: {share:.2%}" for pattern, share in budget.items())


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
    tuned = provenance["tuned"] if is_hub_id(provenance["tuned"]) else Path(provenance["tuned"]).name
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


# ---- the others ----------------------------------------------------------------------------------


def _mask_facts(config: Mapping[str, Any], sizes: Mapping[str, int] | None) -> list[str]:
    kind = "divided by its start" if config.get("from_identity") else "as it is"
    return [
        "Method: `ada_sft`",
        f"Phase: `{config.get('phase')}`",
        f"Mask: sigmoid, from {config.get('initial_mask')} on, {kind}",
    ]


def _bottleneck_facts(config: Mapping[str, Any], sizes: Mapping[str, int] | None) -> list[str]:
    size = config.get("bottleneck_size")
    inside = f"bottleneck size {size}" if size else f"reduction factor {config.get('reduction_factor') or 16}"
    return [
        f"Kind: `{config.get('kind')}`, {inside}, activation `{config.get('activation')}`",
        f"Invertible adapter of the embeddings: {config.get('invertible') or 'none'}",
    ]


def _saved_languages(config: Mapping[str, Any]) -> list[str]:
    return sorted((config.get("saved_typology") or {}).get("vectors", {}))


def _hypernetwork_facts(config: Mapping[str, Any], sizes: Mapping[str, int] | None) -> list[str]:
    typology = config.get("saved_typology") or {}
    layer_dim = config.get("layer_dim")
    shown = f", layer embedding {layer_dim} (MAD-G-LS)" if layer_dim else ""
    source = f"{typology.get('source', 'unknown')} {typology.get('version') or ''}".strip()
    count = len(typology.get("feature_names", ()))
    return [
        f"Generates: `{config.get('kind')}` adapters, bottleneck size {config.get('bottleneck_size')}",
        f"Language embedding {config.get('language_dim')}{shown}",
        f"Languages whose vectors are saved with it: {', '.join(_saved_languages(config)) or 'none'}",
        f"Typological vectors: {count} features of {source}, under that source's licence",
    ]


def _set_language(config: Mapping[str, Any]) -> list[str]:
    return [f'model.set_language("{next(iter(_saved_languages(config)), "<language>")}")']


ROWS = {
    "SPARSE_FT": Row(
        title="Sparse fine-tuning",
        text="This adapter changes a few of the base model's own weights: it says which ones, and what to add to each.",
        facts=_sparse_facts,
        tags=lambda config: ["sparse-fine-tuning", plain(config.get("method")).replace("_", "-")],
        has_layers=True,
    ),
    "ADA_SFT": Row(
        title="Sparse fine-tuning",
        text="This adapter multiplies the base model's own linear weights by soft masks, or adds to them, or both.",
        facts=_mask_facts,
        tags=lambda config: ["sparse-fine-tuning", "ada-sft"],
    ),
    "BOTTLENECK": Row(
        title="Bottleneck adapter",
        text="This adapter adds small modules to the layers of a base model, whose own weights it leaves as they are.",
        facts=_bottleneck_facts,
        tags=lambda config: ["bottleneck-adapter", str(config.get("kind"))],
    ),
    "MAD_G": Row(
        title="MAD-G",
        text="A hypernetwork that generates bottleneck adapters of a language from its typological vector. The base "
        "model's own weights stay as they are.",
        facts=_hypernetwork_facts,
        tags=lambda config: ["mad-g", "bottleneck-adapter"],
        usage=_set_language,
    ),
}

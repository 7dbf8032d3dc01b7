"""Adapters of a few weights with known numbers, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peft_sparse import SparseConfig
from peft_sparse.checkpoints import native
from peft_sparse.core.delta import SparseDelta

WORDS = "embeddings.word_embeddings.weight"
QUERY = "encoder.layer.0.attention.self.query.weight"
DENSE = "encoder.layer.1.output.dense.weight"
NORM = "encoder.layer.1.output.LayerNorm.weight"
SHAPES = {WORDS: (4, 3), QUERY: (2, 2), DENSE: (2, 4), NORM: (2,)}


def delta(name: str, entries: dict[int, float]) -> SparseDelta:
    """A delta on one of the parameters above: {flat index: value}."""
    indices = torch.tensor(sorted(entries), dtype=torch.int32)
    return SparseDelta(indices, torch.tensor([entries[i] for i in sorted(entries)]), SHAPES[name]).check()


def first() -> dict[str, SparseDelta]:
    """Six weights of norm 5.5; one of them is tuned and still 0."""
    return {
        WORDS: delta(WORDS, {0: 3.0, 1: 4.0, 5: 0.0}),
        QUERY: delta(QUERY, {0: 1.0, 3: -2.0}),
        DENSE: delta(DENSE, {7: 0.5}),
    }


def second() -> dict[str, SparseDelta]:
    """Five weights, three of which `first` tunes as well, one the other way."""
    return {
        QUERY: delta(QUERY, {0: -1.0, 1: 2.0, 3: -1.0}),
        DENSE: delta(DENSE, {7: 0.5}),
        NORM: delta(NORM, {1: 12.0}),
    }


def save(
    folder: Path, deltas: dict[str, SparseDelta], *, heads: dict[str, Tensor] | None = None, **config: Any
) -> Path:
    """The two files of an adapter, as PEFT would write them."""
    counts = {name: part.count for name, part in deltas.items()}
    settings: dict[str, Any] = {"density": 0.25, "base_model_name_or_path": "some-lab/tiny-bert", **config}
    folder.mkdir(parents=True, exist_ok=True)
    SparseConfig(**settings, counts=counts).save_pretrained(str(folder))
    save_file(native.build(deltas, heads), folder / native.SOURCE, metadata={"format": "pt"})
    return folder

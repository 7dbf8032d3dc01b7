"""Small tables of features, and files like lang2vec's, that tests know by heart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ["S_SVO", "S_SOV", "P_VOICE", "INV_A", "INV_B"]
LANGUAGES = ["eng", "grn", "ind", "nhe"]
VALUES = [[1, 0, 1, 1, 0], [0, 1, 1, 0, 1], [1, 0, 1, 0, 0], [0, 1, 0, 1, 1]]
FEATURES = ("syntax_knn", "phonology_knn", "inventory_knn")


def write_npz(
    path: Path, *, values: Any = VALUES, sources: tuple[str, ...] = ("predicted",), languages: Any = LANGUAGES
) -> Path:
    """A file like lang2vec's; `values` [L, d] for one source, [L, d, sources] for several."""
    data = np.array(values, dtype=np.float32)
    np.savez(
        path,
        data=data[..., None] if data.ndim == 2 else data,
        langs=np.array(languages),
        feats=np.array(NAMES),
        sources=np.array(sources),
    )
    return path


def write_json(path: Path, *, values: Any = VALUES, **more: Any) -> Path:
    spans = {"syntax_knn": slice(0, 2), "phonology_knn": slice(2, 3), "inventory_knn": slice(3, 5)}
    content = {
        "features": {name: NAMES[span] for name, span in spans.items()},
        "vectors": {
            code: {name: row[span] for name, span in spans.items()} for code, row in zip(LANGUAGES, values, strict=True)
        },
    }
    path.write_text(json.dumps({**content, **more}))
    return path


def write_csv(path: Path, *, values: Any = VALUES, separator: str = ",") -> Path:
    lines = [["code", *NAMES], *([code, *map(str, row)] for code, row in zip(LANGUAGES, values, strict=True))]
    path.write_text("\n".join(separator.join(line) for line in lines) + "\n")
    return path

"""Dependency parsing on top of an encoder: the shallow biaffine parser, its batches, its trees and its scores.

Names are loaded when asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY = {
    "RELATIONS": "relations",
    "BiaffineParser": "parser",
    "ParserCollator": "features",
    "attachment_metrics": "scores",
    "attachment_scores": "scores",
    "encode_sentences": "features",
    "maximum_spanning_tree": "trees",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

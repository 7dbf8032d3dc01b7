"""Dependency parsing on top of an encoder: the shallow biaffine parser, its batches, its trees and its scores.

Names are loaded when asked for.
"""

from __future__ import annotations

from .._names import lazy

_HOMES = {
    "RELATIONS": "relations",
    "BiaffineParser": "parser",
    "ParserCollator": "features",
    "attachment_metrics": "scores",
    "attachment_scores": "scores",
    "encode_sentences": "features",
    "maximum_spanning_tree": "trees",
}

__all__ = sorted(_HOMES)

__getattr__ = lazy(__name__, {name: (module, name) for name, module in _HOMES.items()})

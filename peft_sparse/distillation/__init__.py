"""Small models out of large ones: fewer tokens, fewer layers, and what distils one into the other.

Names are loaded when asked for: the trainer imports transformers' trainer.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAZY = {
    "DistillationLoss": "losses",
    "DistillationTrainer": "trainer",
    "ReducedAdapter": "adapters",
    "ReducedVocabulary": "vocabulary",
    "Teacher": "teacher",
    "VocabularyRows": "rows",
    "distilled_trainer": "trainer",
    "make_student": "student",
    "reduce_adapter": "adapters",
    "reduce_vocabulary": "vocabulary",
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Small models out of large ones: fewer tokens, fewer layers, and what distils one into the other.

Names are loaded when asked for: the trainer imports transformers' trainer.
"""

from __future__ import annotations

from .._names import lazy

_HOMES = {
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

__all__ = sorted(_HOMES)

__getattr__ = lazy(__name__, {name: (module, name) for name, module in _HOMES.items()})

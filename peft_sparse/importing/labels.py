"""The labels of the published task adapters of composable-sft, whose files do not hold them.

From the training scripts of that repository: the labels of tokens are sorted by name there, with "_" left out, not in
the order of the data sets. The published files themselves were not at hand when this was written.
"""

from __future__ import annotations

import re

from ..parsing.relations import RELATIONS

_UNIVERSAL_POS = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X"
# {task in the name of the repository: (PEFT's task type, labels in the order of their ids)}
TASKS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "pos": ("TOKEN_CLS", tuple(_UNIVERSAL_POS.split())),
    "masakhaner": ("TOKEN_CLS", ("B-LOC", "B-ORG", "B-PER", "I-LOC", "I-ORG", "I-PER", "O")),
    "dp": (None, RELATIONS),
    "nli": ("SEQ_CLS", ("entailment", "neutral", "contradiction")),
    "nusax_senti": ("SEQ_CLS", ("negative", "neutral", "positive")),
    "squadv1": ("QUESTION_ANS", ()),
}
_BASES = {"mbert": "google-bert/bert-base-multilingual-cased", "xlmr": "FacebookAI/xlm-roberta-base"}
_PUBLISHED = re.compile(
    rf"(?P<base>mbert|xlmr)-(?:task-sft-(?P<task>{'|'.join(TASKS)})(?:-ms)?|lang-sft-[a-z_]+-small)(?![a-z0-9_-])"
)


def published_task(name: str) -> str | None:
    """The task of a published adapter, by the name of its repository or folder; None if it is none of them."""
    found = _PUBLISHED.search(name.lower())
    return found["task"] if found is not None else None


def published_base(name: str) -> str | None:
    """The base model of a published adapter, by the name of its repository or folder; None if it is none of them."""
    found = _PUBLISHED.search(name.lower())
    return _BASES[found["base"]] if found is not None else None

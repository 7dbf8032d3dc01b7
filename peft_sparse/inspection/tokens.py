"""Which tokens an adapter changed: the rows of an embedding matrix, and the texts that belong to them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..core.delta import SparseDelta
from ..errors import ConfigError
from ..selection.anatomy import EMBEDDINGS, place_of
from ..selection.top_k import top_k
from .reading import Adapter

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
_UNDECODABLE = "\ufffd"


class Tokenizer(Protocol):
    """What is asked of a tokenizer: transformers' have it."""

    def __len__(self) -> int: ...

    def decode(self, token_ids: Sequence[int], /) -> str: ...

    def convert_ids_to_tokens(self, ids: int, /) -> str: ...


@dataclass(frozen=True)
class ChangedRow:
    """A row of a matrix that an adapter changes.

    Attributes:
        row: its number; of an embedding matrix, the token's id.
        norm: Euclidean norm of its change, in the units of the weights.
        count: how many of its entries are tuned.
    """

    row: int
    norm: float
    count: int


def changed_rows(delta: SparseDelta, *, top: int = 20) -> list[ChangedRow]:
    """The rows that changed most, by the norm of their change, ties to the lowest number.

    Args:
        delta: of a matrix [V, D].
        top: how many rows at most; rows without a tuned entry are left out.

    Raises:
        ValueError: the delta is not one of a matrix.

    Cost: two numbers per row of the matrix.
    """
    if len(delta.shape) != 2:
        raise ValueError(f"delta must be of a matrix, got one of shape {delta.shape}")
    height, width = delta.shape
    rows = delta.indices.long().cpu() // max(1, width)
    counts = torch.bincount(rows, minlength=height)
    norms = torch.bincount(rows, weights=delta.values.detach().cpu().double().square(), minlength=height).sqrt()
    # A tuned row whose change is 0 still comes before rows that are not tuned.
    scores = torch.where(counts > 0, norms, -1.0)
    chosen = top_k(scores, min(top, int((counts > 0).sum())), name="the rows' norms").long()
    ordered = chosen[scores[chosen].argsort(descending=True, stable=True)]
    return [ChangedRow(row, float(norms[row]), int(counts[row])) for row in ordered.tolist()]


def embedding_matrix(deltas: Mapping[str, SparseDelta]) -> str | None:
    """The parameter that holds the tokens' embeddings: the tuned embedding matrix with the most rows, if any."""
    matrices = [
        name
        for name, delta in deltas.items()
        if delta.count and len(delta.shape) == 2 and place_of(name).part == EMBEDDINGS
    ]
    return max(matrices, key=lambda name: deltas[name].shape[0], default=None)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as it can be printed in one line: blanks are seen, control characters escaped."""
    try:
        text = tokenizer.decode([token])
        if not text or _UNDECODABLE in text:  # part of a character: the vocabulary's own spelling of its bytes
            text = tokenizer.convert_ids_to_tokens(token) or ""
    except (IndexError, KeyError, TypeError, OverflowError):  # a row that pads the matrix and is no token
        text = ""
    if not text:
        return f"row {token}"
    return "".join("␣" if char == " " else char if char.isprintable() else ascii(char)[1:-1] for char in str(text))


def load_tokenizer(adapter: Adapter, given: str | None = None) -> Any | None:
    """The tokenizer for an adapter's embeddings, from this machine where none is named.

    Args:
        adapter: its folder is looked into first, then its base model, if that is a folder or in the Hub's cache.
        given: folder or Hub id of another one.

    Returns:
        a tokenizer of transformers; None if none is named and none is found, with a warning that says so.

    Raises:
        ConfigError: `given` cannot be loaded, or has more tokens than the adapter's matrix has rows.
    """
    name = embedding_matrix(adapter.deltas)
    if name is None:
        return None
    rows = adapter.deltas[name].shape[0]
    if given is not None:
        tokenizer, reason = _try_loading(given, local_only=False)
        if tokenizer is None:
            raise ConfigError(f"tokenizer={given!r}: no tokenizer can be loaded from there ({reason})")
        if len(tokenizer) > rows:
            found = f"has {len(tokenizer):,} tokens, but '{name}' of '{adapter.name}' only {rows:,} rows"
            raise ConfigError(f"tokenizer={given!r} {found}. Give the tokenizer of the adapter's base model")
        return tokenizer
    base = adapter.config.get("base_model_name_or_path")
    has_own = adapter.folder is not None and any((adapter.folder / file).is_file() for file in _TOKENIZER_FILES)
    for place in [*([str(adapter.folder)] if has_own else []), *([base] if base else [])]:
        tokenizer, _ = _try_loading(place, local_only=True)
        if tokenizer is not None and len(tokenizer) <= rows:
            return tokenizer
    logger.warning(
        "No tokens are shown for '%s': neither its folder nor its base model (%s) has a fitting tokenizer on this "
        "machine. Name one (tokenizer).",
        adapter.name,
        base or "not named",
    )
    return None


def _try_loading(place: str, *, local_only: bool) -> tuple[Any | None, str]:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=local_only), ""
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        return None, str(error).strip().splitlines()[0]

"""Which tokens some texts use, counted per language, and whether another tokenizer cuts them alike."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from tokenizers import Encoding, Tokenizer

from ..errors import ConfigError
from .tokenizer_json import WORD_PIECE, word_pieces

# A text, or one that is cut into words already.
Text: TypeAlias = "str | Sequence[str]"
_CHUNK = 1000


@dataclass(frozen=True, eq=False)
class Counts:
    """How often texts use each token.

    Attributes:
        of_language: {language: [V] int64, how often each id occurs}.
        in_unknown_words: ids that WordPiece looks at in words that it finds unknown.
    """

    of_language: Mapping[str, np.ndarray]
    in_unknown_words: frozenset[int]

    def used(self, *, min_count: int = 1, min_probability: float = 0.0) -> set[int]:
        """Ids that at least one language uses as often as is asked for."""
        used = set(self.in_unknown_words)
        for counts in self.of_language.values():
            limit = max(min_count, min_probability * counts.sum(), 1)
            used |= set(np.flatnonzero(counts >= limit).tolist())
        return used


@dataclass(frozen=True)
class Sameness:
    """How two tokenizers cut the texts of a language.

    Attributes:
        texts: how many there are.
        same: how many of them both cut in the same way.
        tokens_before, tokens_after: tokens of all of them.
        first: the first text that they cut differently; None if there is none.
    """

    texts: int
    same: int
    tokens_before: int
    tokens_after: int
    first: Text | None = None

    @property
    def share(self) -> float:
        """Share of the texts that both cut in the same way, in [0, 1]."""
        return self.same / self.texts if self.texts else 1.0


def by_language(texts: object, *, name: str = "texts") -> dict[str, list[Text]]:
    """{language: its texts}, of what a user gave: a mapping of languages, or texts of no named language.

    Raises:
        ConfigError: something in it is no text, or there is no text at all.
    """
    if isinstance(texts, (str, bytes)):
        raise ConfigError(f"{name} must be a list of texts or {{language: texts}}, got one text: write [text].")
    if not isinstance(texts, Iterable):
        raise ConfigError(f"{name} must be a list of texts or {{language: texts}}, got {texts!r}.")
    if not isinstance(texts, Mapping):
        found = {"texts": list(texts)}
    else:
        for language, ones in texts.items():
            if isinstance(ones, (str, bytes)) or not isinstance(ones, Iterable):
                raise ConfigError(f"{name}[{language!r}] must be a list of texts, got {ones!r:.60}.")
        found = {str(language): list(ones) for language, ones in texts.items()}
    for language, ones in found.items():
        for place, text in enumerate(ones):
            is_words = isinstance(text, (list, tuple)) and all(isinstance(word, str) for word in text)
            if not isinstance(text, str) and not is_words:
                raise ConfigError(
                    f"{name}: number {place} of {language!r} must be a text or a list of words: {text!r}."
                )
    return found


def plain_tokenizer(spec: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a tokenizer.json, without truncation, padding and dropout: nothing may go uncounted."""
    model = {**spec["model"], "dropout": None} if spec["model"].get("dropout") else spec["model"]
    return Tokenizer.from_str(json.dumps({**spec, "model": model, "truncation": None, "padding": None}))


def encode(tokenizer: Tokenizer, texts: Sequence[Text], *, add_special_tokens: bool = False) -> Iterator[Encoding]:
    """The encodings of texts, in their order."""
    for first in range(0, len(texts), _CHUNK):
        chunk = texts[first : first + _CHUNK]
        encoded: dict[int, Encoding] = {}
        for is_words in (False, True):
            places = [place for place, text in enumerate(chunk) if isinstance(text, str) is not is_words]
            inputs = [chunk[place] if not is_words else list(chunk[place]) for place in places]
            found = tokenizer.encode_batch(inputs, is_pretokenized=is_words, add_special_tokens=add_special_tokens)
            encoded.update(zip(places, found, strict=True))
        yield from (encoded[place] for place in range(len(chunk)))


def count(spec: Mapping[str, Any], languages: Mapping[str, Sequence[Text]], size: int) -> Counts:
    """Count the tokens of texts, special ones that the tokenizer would put around them left out.

    Args:
        spec: content of the tokenizer.json.
        languages: {language: texts}.
        size: V, above every id.
    """
    tokenizer = plain_tokenizer(spec)
    unknown = spec["model"]["vocab"].get(spec["model"]["unk_token"]) if spec["model"]["type"] == WORD_PIECE else None
    counts, pieces = dict[str, np.ndarray](), set[int]()
    for language, texts in languages.items():
        found = np.zeros(size, dtype=np.int64)
        for text, encoding in zip(texts, encode(tokenizer, texts), strict=True):
            np.add.at(found, encoding.ids, 1)
            if unknown is not None and unknown in encoding.ids:
                for word in _unknown_words(tokenizer, text, encoding, unknown):
                    pieces |= word_pieces(word, spec)
        counts[language] = found
    return Counts(counts, frozenset(pieces))


def _unknown_words(tokenizer: Tokenizer, text: Text, encoding: Encoding, unknown: int) -> Iterator[str]:
    for index, (start, end), place in zip(encoding.ids, encoding.offsets, encoding.word_ids, strict=True):
        if index != unknown:
            continue
        word = text[start:end] if isinstance(text, str) else text[place][start:end]
        if tokenizer.normalizer is not None:
            word = tokenizer.normalizer.normalize_str(word)
        pieces = [(word, None)] if tokenizer.pre_tokenizer is None else tokenizer.pre_tokenizer.pre_tokenize_str(word)
        yield from (piece for piece, _ in pieces)


def compare(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    new_ids: Mapping[int, int],
    languages: Mapping[str, Sequence[Text]],
) -> dict[str, Sameness]:
    """How two tokenizers cut texts, special tokens included.

    Args:
        before, after: contents of their tokenizer.json.
        new_ids: {id of the first: id of the second} of the tokens that both have.
        languages: {language: texts}.
    """
    old, new = plain_tokenizer(before), plain_tokenizer(after)
    found = {}
    for language, texts in languages.items():
        encodings = zip(
            encode(old, texts, add_special_tokens=True), encode(new, texts, add_special_tokens=True), strict=True
        )
        same, tokens_before, tokens_after, first = 0, 0, 0, None
        for text, (one, other) in zip(texts, encodings, strict=True):
            is_same = [new_ids.get(index) for index in one.ids] == other.ids and one.type_ids == other.type_ids
            same += is_same
            tokens_before, tokens_after = tokens_before + len(one.ids), tokens_after + len(other.ids)
            first = text if first is None and not is_same else first
        found[language] = Sameness(len(texts), same, tokens_before, tokens_after, first)
    return found

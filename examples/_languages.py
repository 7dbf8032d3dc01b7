"""Text of many languages and their typological vectors: real ones from a folder, or invented languages."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from _data import read_texts
from _readers import bad
from _worlds import pretrained_bert
from rich.console import Console

from peft_sparse import Typology, load_typology


@dataclass(frozen=True)
class Corpus:
    """Sentences of each language, by its code: {code: sentences}. The pivot needs a vector alone."""

    pivot: str
    text: dict[str, list[str]]
    held_out: dict[str, list[str]]
    typology: Typology

    def called(self, language: str) -> str | None:
        """The code under which there is text of a language, however it is spelt; None if there is none."""
        if language not in self.typology:
            return None
        resolve = self.typology.resolve
        return next((code for code in self.text if resolve(code) == resolve(language)), None)


def read_corpus(
    data: str, typology: Path | None, pivot: str, console: Console, *, column: str = "text", language_column: str = ""
) -> Corpus:
    """Text of all languages that `read_texts` finds in `data` and the typology knows, two lines at least of each."""
    vectors = load_typology(typology)
    vectors.resolve(pivot)
    found = read_texts(str(data), column=column, language_column=language_column)
    known: dict[str, str] = {}  # {code of the typology: code of the data}
    for code, text in found.items():
        if code not in vectors:
            console.print(f"text of {code!r} is left out: the typology has no language {code!r}")
        elif len(text) < 2:
            console.print(f"text of {code!r} is left out: of {len(text)} lines none can be held out, two are needed")
        elif (other := known.setdefault(vectors.resolve(code), code)) != code:
            raise bad(
                f"{data} has text of {other!r} and of {code!r}, which the typology takes for one language, "
                f"{vectors.resolve(code)!r}: give them one code, or leave one out",
                "--data",
            )
    return _split(pivot, {code: found[code] for code in known.values()}, vectors)


def _split(pivot: str, text: dict[str, list[str]], typology: Typology, *, max_held_out: int = 200) -> Corpus:
    """Of each language a tenth is held out, at most 200 sentences, taken from all over its text."""
    train, held_out = {}, {}
    for code, sentences in text.items():
        shuffled = random.Random(code).sample(sentences, len(sentences))
        cut = max(1, min(max_held_out, len(shuffled) // 10))
        held_out[code], train[code] = shuffled[:cut], shuffled[cut:]
    return Corpus(pivot, train, held_out, typology)


# ---- invented languages --------------------------------------------------------------------------

# Of each pair a language has one. Two decide the order of words, four the form of a particle.
CHOICES = [
    ("verb last", "verb first"),
    ("adjective after noun", "adjective before noun"),
    ("article ve", "article la"),
    ("object with na", "object with su"),
    ("past with ti", "past with lo"),
    ("hearsay with ka", "hearsay with mi"),
]
PIVOT, UNSEEN = "piv", "lim"
CODES = [PIVOT, *(f"{letter}or" for letter in "bdfghjkmnprstvwz"), UNSEEN]
NOUNS = ["stone", "river", "bird", "child", "house", "fish", "tree", "song"]
ADJECTIVES = ["old", "red", "small", "good"]
VERBS = ["see", "find", "carry", "want", "lose", "make"]


def _choices(seed: int) -> dict[str, list[bool]]:
    """{code: whether it has the first of each pair}, all languages different."""
    numbers = random.Random(seed).sample(range(2 ** len(CHOICES)), len(CODES))
    return {
        code: [bool(number >> i & 1) for i in range(len(CHOICES))] for code, number in zip(CODES, numbers, strict=True)
    }


def _sentence(language: list[bool], chance: random.Random) -> str:
    verb_last, adjective_after, *forms = language
    # The particle is the last word of the choice's name.
    article, case, past, hearsay = (pair[not f].split()[-1] for pair, f in zip(CHOICES[2:], forms, strict=True))

    def noun_phrase() -> list[str]:
        noun, adjective = chance.choice(NOUNS), chance.choice(ADJECTIVES)
        return [article, *([noun, adjective] if adjective_after else [adjective, noun])]

    nouns, verb = [*noun_phrase(), *noun_phrase(), case], [chance.choice(VERBS), past]
    return " ".join([*nouns, *verb, hearsay] if verb_last else [*verb, *nouns, hearsay])


def _sentences(seed: int, count: int) -> dict[str, list[str]]:
    """{code: sentences}: the languages share their words, and differ in what `CHOICES` lists."""
    chance = random.Random(seed + count)
    return {code: [_sentence(choices, chance) for _ in range(count)] for code, choices in _choices(seed).items()}


def invented_corpus(seed: int = 0) -> Corpus:
    """Eighteen languages. Their vectors say for each choice which of the two a language has: 12 zeros and ones."""
    vectors = {
        code: [value for first in choices for value in (float(first), float(not first))]
        for code, choices in _choices(seed).items()
    }
    names = [name for pair in CHOICES for name in pair]
    typology = Typology.from_vectors(vectors, feature_names=names, source="invented languages")
    return _split(PIVOT, _sentences(seed, 2000), typology)


def tiny_multilingual_bert(directory: Path, unseen: str, *, seed: int = 0, steps: int = 1000) -> Path:
    """A BERT of two layers, pretrained on raw text of the pivot and a little of all others but one."""
    text = _sentences(seed, 3000)
    sentences = [
        sentence for code in CODES if code != unseen for sentence in text[code][: 3000 if code == PIVOT else 10]
    ]
    words = sorted({word for sentences in text.values() for sentence in sentences for word in sentence.split()})
    return pretrained_bert(directory, words, sentences, seed=seed, steps=steps)

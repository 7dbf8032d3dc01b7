"""An invented world: two languages with one grammar and mostly different words, and rows for each task in both."""

from __future__ import annotations

import random
from pathlib import Path

from _worlds import pretrained_bert

SOURCE, TARGET = "near", "far"
SHARED = 0.3  # of the meanings have one word in both languages
KINDS = {
    "DET": ["this", "that"],
    "NOUN": ["dog", "cat", "bird", "boat", "stone", "child", "house", "fish"],
    "VERB": ["sees", "wants", "finds", "brings", "hears", "sells"],
    "GOOD": ["kind", "bright", "warm", "swift"],
    "BAD": ["rotten", "dull", "cold", "broken"],
    "PERSON": ["anna", "boris", "chidi", "dolores"],
    "PLACE": ["lima", "accra", "oslo", "quito"],
    "ADP": ["near", "under"],
    "PART": ["not"],
    "MARK": ["who"],
}
TAGS = {"PERSON": "PROPN", "PLACE": "PROPN", "GOOD": "ADJ", "BAD": "ADJ", "MARK": "PRON"}


class World:
    """The languages' words, and sentences and rows made of them."""

    def __init__(self, seed: int = 0) -> None:
        chance = random.Random(seed)
        meanings = [word for words in KINDS.values() for word in words]
        forms = sorted(
            {"".join(chance.choice("ptkmnslr") + chance.choice("aeiou") for _ in range(3)) for _ in range(400)}
        )
        chance.shuffle(forms)
        pool = iter(forms)
        near = {meaning: next(pool) for meaning in meanings}
        far = {meaning: near[meaning] if chance.random() < SHARED else next(pool) for meaning in meanings}
        self.words = {SOURCE: near, TARGET: far}

    def text(self, language: str, count: int, *, seed: int) -> list[str]:
        """Raw sentences, of all kinds."""
        chance = random.Random(f"text {seed} {language}")
        return [" ".join(self._words(language, self._clause(chance)[0])) for _ in range(count)]

    def rows(self, task: str, language: str, count: int, *, seed: int) -> list[dict]:
        """Rows of a task."""
        chance = random.Random(f"{task} {seed} {language}")
        return [getattr(self, f"_{task}")(language, chance) for _ in range(count)]

    # ---- sentences ---------------------------------------------------------------------------------

    def _clause(
        self, chance: random.Random, feeling: str | None = None
    ) -> tuple[list[tuple[str, str]], list[int], list[str]]:
        """subject verb object, at times with a place: [(kind, meaning)], heads, relations."""
        tokens: list[tuple[str, str]] = []
        heads: list[int] = []
        relations: list[str] = []

        def add(kind: str, relation: str, head: int) -> int:
            tokens.append((kind, chance.choice(KINDS[kind])))
            heads.append(head)
            relations.append(relation)
            return len(tokens)

        def phrase(relation: str) -> list[int]:
            if feeling is None and chance.random() < 0.4:
                return [add("PERSON", relation, 0)]
            start = len(tokens)
            adjective = feeling or (chance.choice(["GOOD", "BAD"]) if chance.random() < 0.4 else None)
            noun = start + (3 if adjective else 2)
            add("DET", "det", noun)
            if adjective:
                add(adjective, "amod", noun)
            return [add("NOUN", relation, 0)]

        dependents = phrase("nsubj")
        verb = add("VERB", "root", 0)
        dependents += phrase("obj")
        if chance.random() < 0.5:
            place = len(tokens) + 2
            add("ADP", "case", place)
            dependents.append(add("PLACE", "obl", 0))
        for dependent in dependents:
            heads[dependent - 1] = verb
        return tokens, heads, relations

    def _words(self, language: str, tokens: list[tuple[str, str]]) -> list[str]:
        return [self.words[language][meaning] for _, meaning in tokens]

    # ---- tasks -------------------------------------------------------------------------------------

    def _pos(self, language: str, chance: random.Random) -> dict:
        tokens, _, _ = self._clause(chance)
        return {"tokens": self._words(language, tokens), "upos": [TAGS.get(kind, kind) for kind, _ in tokens]}

    def _ner(self, language: str, chance: random.Random) -> dict:
        tokens, _, _ = self._clause(chance)
        tags = {"PERSON": "B-PER", "PLACE": "B-LOC"}
        return {"tokens": self._words(language, tokens), "tags": [tags.get(kind, "O") for kind, _ in tokens]}

    def _dp(self, language: str, chance: random.Random) -> dict:
        tokens, heads, relations = self._clause(chance)
        return {"tokens": self._words(language, tokens), "heads": heads, "relations": relations}

    def _sentiment(self, language: str, chance: random.Random) -> dict:
        label = chance.choice(["positive", "negative"])
        tokens, _, _ = self._clause(chance, feeling="GOOD" if label == "positive" else "BAD")
        return {"text": " ".join(self._words(language, tokens)), "label": label}

    def _nli(self, language: str, chance: random.Random) -> dict:
        """The hypothesis says the same, denies it, or is about a place."""
        label = chance.choice(["entailment", "contradiction", "neutral"])
        subject, verb = chance.choice(KINDS["PERSON"]), chance.choice(KINDS["VERB"])
        premise = [("PERSON", subject), ("VERB", verb), ("DET", "this"), ("NOUN", chance.choice(KINDS["NOUN"]))]
        if label == "neutral":
            hypothesis = [*premise[:2], ("ADP", chance.choice(KINDS["ADP"])), ("PLACE", chance.choice(KINDS["PLACE"]))]
        else:
            hypothesis = premise[:2] + [("PART", "not")] * (label == "contradiction") + premise[2:]
        return {
            "premise": " ".join(self._words(language, premise)),
            "hypothesis": " ".join(self._words(language, hypothesis)),
            "label": label,
        }

    def _qa(self, language: str, chance: random.Random) -> dict:
        """Who does it? The one name in a sentence of things."""
        tokens, _, _ = self._clause(chance, feeling=chance.choice(["GOOD", "BAD"]))
        person = ("PERSON", chance.choice(KINDS["PERSON"]))
        place = chance.randrange(len(tokens) + 1)
        words = self._words(language, [*tokens[:place], person, *tokens[place:]])
        return {
            "question": self.words[language]["who"],
            "context": " ".join(words),
            "answer": words[place],
            "answer_start": len(" ".join([*words[:place], ""])),
        }


def tiny_bert(directory: Path, world: World, *, seed: int = 0, steps: int = 400) -> Path:
    """A BERT of two layers, pretrained on raw text of the source language and a little of the target's."""
    words = sorted({form for forms in world.words.values() for form in forms.values()})
    stream = world.text(SOURCE, 3000, seed=seed + 4) + world.text(TARGET, 150, seed=seed + 5)
    random.Random(seed).shuffle(stream)
    joined = " ".join(stream).split()
    # All of one length, as pretraining takes them.
    pieces = [" ".join(joined[i : i + 12]) for i in range(0, len(joined) - 12, 12)]
    return pretrained_bert(directory, words, pieces, seed=seed, steps=steps)

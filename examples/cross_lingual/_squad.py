"""Extractive question answering: windows over long contexts, the best span, and the official scores of SQuAD."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

STRIDE, CANDIDATES, LONGEST = 128, 20, 30


def windows(tokenizer, rows: list[dict], max_length: int, *, with_answers: bool) -> list[dict]:
    """Rows cut to windows that overlap; in training with the answer's first and last token, or the first of all."""
    encoded = tokenizer(
        [row["question"].strip() for row in rows],
        [row["context"] for row in rows],
        truncation="only_second",
        max_length=max_length,
        stride=min(STRIDE, max_length // 4),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    found = []
    names = [name for name in encoded if name not in ("offset_mapping", "overflow_to_sample_mapping")]
    for number, place in enumerate(encoded["overflow_to_sample_mapping"]):
        in_context = encoded.sequence_ids(number)
        offsets = [
            offset if part == 1 else None
            for offset, part in zip(encoded["offset_mapping"][number], in_context, strict=True)
        ]
        window: dict[str, Any] = {name: encoded[name][number] for name in names}
        if with_answers:
            window["start_positions"], window["end_positions"] = _positions(rows[place], offsets)
        else:
            window |= {"offsets": offsets, "row": place}
        found.append(window)
    return found


def _positions(row: dict, offsets: list[tuple[int, int] | None]) -> tuple[int, int]:
    first = row["answer_start"]
    last = first + len(row["answer"])
    inside = [i for i, o in enumerate(offsets) if o is not None and o[0] < last and o[1] > first]
    spans = [o for o in offsets if o is not None]
    is_whole = bool(inside) and spans[0][0] <= first and spans[-1][1] >= last
    return (inside[0], inside[-1]) if is_whole else (0, 0)


def best_span(starts: list[float], ends: list[float], offsets: list[Any]) -> tuple[float, int, int]:
    """(score, first character, last character) of the span with the largest sum of logits, 30 tokens at most."""
    allowed = [i for i, offset in enumerate(offsets) if offset is not None]
    first = sorted(allowed, key=lambda i: -starts[i])[:CANDIDATES]
    last = sorted(allowed, key=lambda i: -ends[i])[:CANDIDATES]
    pairs = [(starts[i] + ends[j], offsets[i][0], offsets[j][1]) for i in first for j in last if i <= j < i + LONGEST]
    return max(pairs, default=(float("-inf"), 0, 0))


def normalised(text: str) -> str:
    """Lower case, without punctuation and English articles, as SQuAD's script has it."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(answer: str, gold: str) -> float:
    return float(normalised(answer) == normalised(gold))


def f1(answer: str, gold: str) -> float:
    """Of the words that two answers share; two empty ones are equal."""
    own, right = normalised(answer).split(), normalised(gold).split()
    if not own or not right:
        return float(own == right)
    shared = sum((Counter(own) & Counter(right)).values())
    return 2 * shared / (len(own) + len(right))

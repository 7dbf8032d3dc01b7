"""Labelled rows in several languages and raw text for a benchmark of transfer: reading, tokenising, predicting."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

EVAL_BATCH = 64
MASKED = 0.15


@dataclass(frozen=True)
class Source:
    """Where the parts of a task lie under the data folder, and what it is scored by.

    Attributes:
        language: that of the labelled rows.
        train: {train,valid}.jsonl of the source language, in this folder.
        tests: {language}/test.jsonl, in this folder.
        languages: those to transfer to unless others are asked for.
        fields: the text or texts of a row.
        metric: "macro F1" or "accuracy".
        budget: the layer budget of the SC-SFT report for this task.
    """

    language: str
    train: str
    tests: str
    languages: tuple[str, ...]
    fields: tuple[str, ...]
    metric: str
    budget: str


SOURCES = {
    "sentiment": Source(
        "ind", "nusax_senti/ind", "nusax_senti", ("ace", "jav", "sun", "min"), ("text",), "macro F1", "sc_sft_sentiment"
    ),
    "nli": Source(
        "eng",
        "mnli_en",
        "americasnli",
        ("aym", "gn", "nah", "quy"),
        ("premise", "hypothesis"),
        "accuracy",
        "sc_sft_nli",
    ),
}


@dataclass(frozen=True)
class Task:
    """A task as a trainer takes it.

    Attributes:
        labels: names of the classes.
        train, valid: rows of the source language.
        tests: {language: rows}, the source language's own too where it has a test.
        ids: {language: the id of each test row}; rows with equal ids are translations of each other.
    """

    labels: list[str]
    train: list[dict]
    valid: list[dict]
    tests: dict[str, list[dict]]
    ids: dict[str, list[int]]

    def truth(self, language: str) -> list[int]:
        return [row["labels"] for row in self.tests[language]]

    def checksum(self) -> int:
        return zlib.crc32(json.dumps([self.train, self.valid, self.tests]).encode())


def read_task(data: Path, source: Source, languages: list[str], tokenizer, *, length: int, rows: int | None) -> Task:
    """Read and tokenise a task; `rows` is how many rows to use of each file, None for all."""
    train, valid = (_read_jsonl(data / source.train / f"{split}.jsonl")[:rows] for split in ("train", "valid"))
    labels = sorted({row["label"] for row in train})
    own = [source.language] if (data / source.tests / source.language).is_dir() else []
    tests = {name: _read_jsonl(data / source.tests / name / "test.jsonl")[:rows] for name in [*own, *languages]}

    def encode(found: list[dict]) -> list[dict]:
        texts = [[row[field] for row in found] for field in source.fields]
        ids = tokenizer(*texts, truncation=True, max_length=length)
        return [
            {**{name: column[i] for name, column in ids.items()}, "labels": labels.index(row["label"])}
            for i, row in enumerate(found)
        ]

    return Task(
        labels,
        encode(train),
        encode(valid),
        {name: encode(found) for name, found in tests.items()},
        {name: [row["id"] for row in found] for name, found in tests.items()},
    )


def read_text(
    data: Path, language: str, tokenizer, *, length: int, files: tuple[str, ...] = ("{}.txt", "nusax_train_{}.txt")
) -> tuple[list[dict], list[dict]]:
    """(train, held out) blocks of at most `length` tokens of all raw text of a language, a twentieth held out.

    `files`: patterns of the names of its files in the folder `text`; {} is the language.
    """
    patterns = [pattern.format(language) for pattern in files]
    paths = [path for pattern in patterns for path in sorted((data / "text").glob(pattern))]
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    if not lines:
        raise SystemExit(f"no raw text of {language!r}: {data / 'text'} has none of {', '.join(patterns)}")
    cut = tokenizer(lines, truncation=True, max_length=length, return_overflowing_tokens=True)["input_ids"]
    blocks = [{"input_ids": ids} for ids in cut if len(ids) >= 8]
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0)).tolist()
    held = max(1, min(128, len(blocks) // 20))
    return [blocks[i] for i in order[held:]], [blocks[i] for i in order[:held]]


def _read_jsonl(path: Path) -> list[dict]:
    if not path.exists():
        raise SystemExit(f"{path} does not exist: --data takes a folder like the one that the docstring describes")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def batches(
    rows: list[dict], collator, device: torch.device, *, size: int = EVAL_BATCH
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """(positions, batch) with rows of like length together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    for start in range(0, len(rows), size):
        chosen = order[start : start + size]
        yield chosen, {name: tensor.to(device) for name, tensor in collator([rows[i] for i in chosen]).items()}


@torch.no_grad()
def predict(model: nn.Module, rows: list[dict], tokenizer) -> tuple[list[int], float]:
    """(class of each row, mean loss), under the bfloat16 autocast that the models train with."""
    model.eval()
    device = next(model.parameters()).device
    found, total = [0] * len(rows), 0.0
    for positions, batch in batches(rows, DataCollatorWithPadding(tokenizer), device):
        labels = batch.pop("labels")
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(**batch).logits.float()
        total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        for position, answer in zip(positions, logits.argmax(-1).tolist(), strict=True):
            found[position] = answer
    return found, total / len(rows)


def language_collator(tokenizer, *, masked: bool, seed: int | None = None) -> DataCollatorForLanguageModeling:
    """Of batches of raw text: with masks, or for predicting the next token."""
    return DataCollatorForLanguageModeling(tokenizer, mlm=masked, mlm_probability=MASKED if masked else None, seed=seed)


@torch.no_grad()
def language_loss(model: nn.Module, rows: list[dict], tokenizer, *, masked: bool) -> float:
    """Mean loss per token: masked, the same ones in every call, or next."""
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    # Decoders have vocabularies of hundreds of thousands, and predict at every position.
    size = EVAL_BATCH if masked else EVAL_BATCH // 16
    for _, batch in batches(rows, language_collator(tokenizer, masked=masked, seed=0), device, size=size):
        labels = batch.pop("labels")
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(**batch).logits
        if not masked:
            logits, labels = logits[:, :-1], labels[:, 1:]
        total += float(nn.functional.cross_entropy(logits[labels >= 0].float(), labels[labels >= 0], reduction="sum"))
        count += int((labels >= 0).sum())
    return total / max(1, count)

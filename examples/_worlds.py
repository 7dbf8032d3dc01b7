"""Two languages and a task between them: real ones from a folder, or invented ones with a tiny model of their own."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from _data import apart, as_text, as_written, find_file, read_rows, read_text, told_apart
from _readers import bad
from rich.progress import track
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForPreTraining, DataCollatorWithPadding, PreTrainedTokenizerFast

Row = tuple[str, int]


@dataclass(frozen=True)
class World:
    """Raw text of two languages, a task labelled in the source language, and its test in the target language.

    Attributes:
        text: {language: sentences}.
    """

    source: str
    target: str
    labels: list[str]
    text: dict[str, list[str]]
    train: list[Row]
    test: list[Row]

    @property
    def head(self) -> dict[str, dict]:
        """Arguments with which `from_pretrained` gives a classifier these labels, by their names."""
        numbers = {label: number for number, label in enumerate(self.labels)}
        return {"id2label": dict(enumerate(self.labels)), "label2id": numbers}


def read_world(
    data: str, source: str, target: str, *, text: str = "", columns: Mapping[str, str] | None = None
) -> World:
    """Real data: labelled rows of both languages as `read_rows` finds them, raw text as `read_text` does.

    Without `text` a folder `text` in the folder `data` has it, or that folder itself. `columns` says what the data call
    "text" and "label".
    """
    data, columns, folder = str(data), columns or {}, Path(data).expanduser()
    if not text and not folder.is_dir():
        raise bad(f"{data} is no folder that could have raw text: say where that is", "--text")
    where, option = (text, "--text") if text else (str(max(folder / "text", folder, key=Path.is_dir)), "--data")
    texts = {
        code: read_text(where, code, column=columns.get("text", "text"), option=option) for code in (target, source)
    }
    cells = {"text": as_text, "label": as_written}
    how = {"columns": columns, "needed": tuple(cells), "cells": cells, "named_by": "--{}-column NAME".format}
    parts = ((source, "train"), (target, "test"))
    apart(*(find_file(data, *part) for part in parts))
    train, test = (read_rows(data, *part, **how) for part in parts)
    labels = sorted({row["label"] for row in train})
    told_apart(labels)
    if unknown := sorted({row["label"] for row in test} - {*labels}):
        raise bad(f"{target!r} has the label {unknown[0]!r}, which {source!r} has not: {labels}", "--data")
    pairs = [[(row["text"], labels.index(row["label"])) for row in part] for part in (train, test)]
    return World(source, target, labels, texts, *pairs)


def encode(tokenizer, rows: list[Row]) -> list[dict]:
    """Rows as a trainer takes them."""
    ids = tokenizer([text for text, _ in rows], truncation=True, max_length=64)["input_ids"]
    return [{"input_ids": i, "labels": label} for i, (_, label) in zip(ids, rows, strict=True)]


@torch.no_grad()
def accuracy(model, tokenizer, rows: list[Row]) -> float:
    """Share of the rows that a classifier labels right."""
    model.eval()
    right = 0
    for start in range(0, len(rows), 64):
        batch = DataCollatorWithPadding(tokenizer)(encode(tokenizer, rows[start : start + 64])).to(model.device)
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(rows)


# ---- invented languages --------------------------------------------------------------------------

TOPICS, LABELS = 4, ["field", "harbour", "kitchen", "workshop"]
WORDS_PER_TOPIC, COMMON_WORDS, TOPICAL, SHARED = 10, 10, 6, 0.3


class Lexicon:
    """Two languages with one grammar and one set of meanings. Three meanings in ten have one word for both."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        meanings = [f"topic{topic}.{i}" for topic in range(TOPICS) for i in range(WORDS_PER_TOPIC)]
        meanings += [f"common{i}" for i in range(COMMON_WORDS)]
        forms = {"".join(chance.choice("ptkmnslr") + chance.choice("aeiou") for _ in range(3)) for _ in range(999)}
        pool = sorted(forms)
        chance.shuffle(pool)
        pool = iter(pool)
        self.near = {meaning: next(pool) for meaning in meanings}
        self.far = {m: self.near[m] if chance.random() < SHARED else next(pool) for m in meanings}

    def rows(self, words: dict[str, str], count: int, seed: int) -> list[Row]:
        """Sentences and their topics. Six words in ten are the topic's, the others common to all."""
        chance = random.Random(seed)
        rows = []
        for _ in range(count):
            topic = chance.randrange(TOPICS)
            meanings = [f"topic{topic}.{chance.randrange(WORDS_PER_TOPIC)}" for _ in range(TOPICAL)]
            meanings += [f"common{chance.randrange(COMMON_WORDS)}" for _ in range(10 - TOPICAL)]
            chance.shuffle(meanings)
            rows.append((" ".join(words[meaning] for meaning in meanings), topic))
        return rows


def invented_world(seed: int = 0) -> World:
    """Nearish has labelled sentences, Farish only raw ones."""
    lexicon = Lexicon(seed)
    raw = {"Farish": lexicon.rows(lexicon.far, 2000, seed + 1), "Nearish": lexicon.rows(lexicon.near, 2000, seed + 6)}
    text = {language: [sentence for sentence, _ in rows] for language, rows in raw.items()}
    train, test = lexicon.rows(lexicon.near, 400, seed + 2), lexicon.rows(lexicon.far, 400, seed + 3)
    return World("Nearish", "Farish", LABELS, text, train, test)


def tiny_bert(directory: Path, *, seed: int = 0, steps: int = 600) -> Path:
    """A BERT of two layers, pretrained on raw Nearish with a little Farish: a language that it has hardly seen."""
    lexicon = Lexicon(seed)
    words = sorted({*lexicon.near.values(), *lexicon.far.values()})
    seen = lexicon.rows(lexicon.near, 3000, seed + 4) + lexicon.rows(lexicon.far, 100, seed + 5)
    return pretrained_bert(directory, words, [sentence for sentence, _ in seen], seed=seed, steps=steps)


def pretrained_bert(directory: Path, words: list[str], sentences: list[str], *, seed: int, steps: int) -> Path:
    """A BERT of two layers and a tokenizer of these words, pretrained on sentences of equal length."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + words
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{token[1:-1].lower()}_token": token for token in special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=32, **names)

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
    )  # fmt: skip
    model = BertForPreTraining(config)
    ids = torch.tensor(tokenizer(sentences)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in track(range(steps), "pretraining a tiny BERT"):
        batch = ids[torch.randint(len(ids), (32,))]
        masked = (torch.rand(batch.shape) < 0.25) & (batch >= len(special))
        scores = model(input_ids=batch.masked_fill(masked, 4)).prediction_logits
        torch.nn.functional.cross_entropy(scores[masked], batch[masked]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory

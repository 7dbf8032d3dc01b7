"""Instruction rows for benchmarks: reading, tokenising and scoring. Loss counts on the answer alone."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

QUESTION, ANSWER = ("instruction", "question", "prompt"), ("output", "answer", "response")
EVAL_BATCH = 8


def read_rows(data: Path, tokenizer, *, max_length: int, valid_rows: int | None) -> tuple[list[dict], list[dict], int]:
    """(train, held out) rows of `input_ids` and `labels`, and a checksum of what they hold.

    Args:
        data: a .jsonl file, of which the last tenth, at most 128 rows, is held out; or a folder with train.jsonl and
            valid.jsonl (or test.jsonl).
        tokenizer: the model's.
        max_length: tokens; longer rows are cut.
        valid_rows: how many held-out rows to use; None for all.
    """
    if data.is_dir():
        held_out = data / "valid.jsonl"
        train, valid = (
            read_jsonl(data / "train.jsonl"),
            read_jsonl(held_out if held_out.exists() else data / "test.jsonl"),
        )
    else:
        found = read_jsonl(data)
        cut = len(found) - max(1, min(128, len(found) // 10))
        train, valid = found[:cut], found[cut:]
    train = [encode(tokenizer, row, max_length) for row in train]
    valid = [encode(tokenizer, row, max_length) for row in valid[:valid_rows]]
    # A question that fills the whole length leaves no answer to learn from.
    train, valid = ([row for row in rows if max(row["labels"]) >= 0] for rows in (train, valid))
    checksum = zlib.crc32(json.dumps([train, valid]).encode())
    return train, sorted(valid, key=lambda row: len(row["input_ids"])), checksum


def read_jsonl(path: Path) -> list[dict]:
    if not path.exists():
        raise SystemExit(f"{path} does not exist: --data takes a .jsonl file, or a folder with train and valid.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_texts(path: Path, tokenizer, max_length: int, count: int) -> list[dict]:
    """Rows of the first lines of a text file, scored whole."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:count]
    encoded = [tokenizer(line)["input_ids"][:max_length] for line in lines]
    # The first token is not predicted; one that is alone has no loss.
    return [{"input_ids": ids, "labels": ids} for ids in encoded if len(ids) > 1]


def encode(tokenizer, row: dict, max_length: int) -> dict:
    """Token ids cut to a length, and labels that are -100 on the question."""
    question = next(row[name] for name in QUESTION if row.get(name))
    text = "\n".join(filter(None, [question, row.get("input")]))
    prompt = tokenizer(f"Instruction: {text}\nResponse:")["input_ids"]
    answer = tokenizer(" " + next(row[name] for name in ANSWER if row.get(name)))["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    return {"input_ids": (prompt + answer)[:max_length], "labels": ([-100] * len(prompt) + answer)[:max_length]}


def collate(rows: list[dict]) -> dict[str, Tensor]:
    """Pad on the right, by length: many models pad with the token that also ends a text."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(lists: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([ids + [fill] * (length - len(ids)) for ids in lists])

    return {
        "input_ids": padded([row["input_ids"] for row in rows], 0),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": padded([row["labels"] for row in rows], -100),
    }


@torch.no_grad()
def row_losses(model: nn.Module, rows: list[dict], *, autocast: bool) -> list[tuple[float, int]]:
    """[(summed loss, number of answer tokens)] of each row; under bfloat16 autocast if the model trained so."""
    model.eval()
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(rows), EVAL_BATCH):
        batch = {name: tensor.to(device) for name, tensor in collate(rows[start : start + EVAL_BATCH]).items()}
        labels = batch.pop("labels")[:, 1:]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            logits = model(**batch).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        found += list(zip(losses.sum(1).tolist(), (labels != -100).sum(1).tolist(), strict=True))
    return found

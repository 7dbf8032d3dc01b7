"""Instruction data for the examples: reading, tokenising, scoring and answering. Loss counts on the answer alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch

HOUSE_STYLE = Path(__file__).parent / "house_style"
READERS = {".csv": "csv", ".json": "json", ".parquet": "parquet"}
QUESTION, ANSWER = ("instruction", "question", "prompt"), ("output", "answer", "response")


def read_pairs(data: str, *, max_held_out: int = 64) -> tuple[list[dict], list[dict]]:
    """(train, held out) rows {"question", "answer"}: of a .jsonl file or a set on the hub, or the built-in ones.

    The built-in answers are one short sentence and a subject in square brackets. From other data the last tenth, at
    most `max_held_out` rows, is held out.
    """
    if not data:
        train, held_out = (_jsonl(HOUSE_STYLE / f"{split}.jsonl") for split in ("train", "heldout"))
        return [_pair(row) for row in train], [_pair(row) for row in held_out]
    rows = _rows(data)
    pairs = [_pair(row) for row in rows]
    if len(pairs) < 2:
        raise SystemExit(f"{data} holds {len(pairs)} rows: give at least two, one to train on and one to hold out")
    cut = len(pairs) - max(1, min(max_held_out, len(pairs) // 10))
    return pairs[:cut], pairs[cut:]


def _rows(data: str) -> list[dict]:
    """Rows of a file, by its ending, or of a set on the hub."""
    path = Path(data)
    if path.suffix == ".jsonl":
        return _jsonl(path)
    from datasets import load_dataset

    if path.suffix not in READERS:
        return list(load_dataset(data, split="train"))
    if not path.is_file():
        raise SystemExit(f"there is no file {data}")
    return list(load_dataset(READERS[path.suffix], data_files=str(path), split="train"))


def _jsonl(path: Path) -> list[dict]:
    if not path.is_file():
        raise SystemExit(f"there is no file {path}")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row = line
        if row is not None and not isinstance(row, dict):
            raise SystemExit(f"{path}, line {number} is no JSON object. A file of comma-separated values ends in .csv.")
        rows += [row] if row else []
    return rows


def _pair(row: dict) -> dict:
    question = next((row[name] for name in QUESTION if row.get(name)), None)
    answer = next((row[name] for name in ANSWER if row.get(name)), None)
    if question is None or answer is None:
        raise SystemExit(f"a row needs one of {QUESTION} and one of {ANSWER}; this one has {sorted(row)}")
    return {"question": "\n".join(filter(None, [question, row.get("input")])), "answer": answer}


def encode_prompt(tokenizer, question: str) -> list[int]:
    """Token ids up to where the answer starts: the model's chat template where it has one."""
    if tokenizer.chat_template is None:
        return tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
    turns = [{"role": "user", "content": question}]
    return tokenizer(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))["input_ids"]


def encode(tokenizer, pairs: list[dict], *, max_length: int = 512) -> list[dict]:
    """Rows with `input_ids` and `labels`, -100 on the question."""
    rows = []
    for pair in pairs:
        prompt = encode_prompt(tokenizer, pair["question"])
        answer = tokenizer(" " + pair["answer"] if tokenizer.chat_template is None else pair["answer"])["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        ids = (prompt + answer)[:max_length]
        rows.append({"input_ids": ids, "labels": ([-100] * len(prompt) + answer)[:max_length]})
    return rows


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pad on the right; by length, since many models pad with the token that also ends a text."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "attention_mask": mask, "labels": padded("labels", -100)}


@torch.no_grad()
def held_out_loss(model, rows: list[dict], *, batch_size: int = 8) -> float:
    """Mean loss per answer token (nats)."""
    model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = {name: tensor.to(model.device) for name, tensor in collate(rows[start : start + batch_size]).items()}
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * count
        tokens += count
    return total / tokens


@torch.no_grad()
def logits(model, rows: list[dict]) -> torch.Tensor:
    """[B, T, V] of a batch of rows, for comparing two models that should be one."""
    model.eval()
    batch = collate(rows)
    return model(**{name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}).logits


@torch.no_grad()
def answers(model, tokenizer, questions: list[str], *, max_new_tokens: int = 32) -> list[str]:
    """The model's most likely continuation of each question, all in one batch padded on the left."""
    model.eval()
    prompts = [encode_prompt(tokenizer, question) for question in questions]
    length = max(map(len, prompts))
    mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts]
    made = model.generate(
        input_ids=torch.tensor([[0] * (length - len(ids)) + ids for ids in prompts], device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in made[:, length:]]

"""Instruction data for the examples: reading, tokenising, scoring and answering. Loss counts on the answer alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import typer
from _data import as_text, as_written, read_set, split_file, with_columns
from _readers import Row, bad

HOUSE_STYLE = Path(__file__).parent / "house_style"
USUAL = {"question": ("instruction", "question", "prompt"), "answer": ("output", "answer", "response")}
# What a question is about: Alpaca's and Dolly's.
BESIDE = ("input", "context")


def read_pairs(
    data: str, *, columns: Mapping[str, str] | None = None, max_held_out: int = 64
) -> tuple[list[dict], list[dict]]:
    """(train, held out) rows {"question", "answer"}: of a file, a folder or a set of the Hub, or the built-in ones.

    The built-in answers are one short sentence and a subject in square brackets. Of a folder without a file for it the
    last tenth is held out, at most `max_held_out` rows. `columns` says what the data call "question" and "answer", or
    "text": that is learnt as it is, without a question, and so are the lines of a text file. Behind a question comes
    what the row has as "input" or "context", unless that is the question or the answer itself.
    """
    if not data:
        train, held_out = (read_set(str(HOUSE_STYLE / f"{split}.jsonl")) for split in ("train", "heldout"))
        return _pairs(train, {}, "house style"), _pairs(held_out, {}, "house style")
    columns = {"text": "text"} if Path(data).suffix.lower() == ".txt" else dict(columns or {})
    if "text" in columns and len(columns) > 1:
        raise bad("a text has no question: --text-column goes without --question-column and --answer-column", "--data")
    if len({*columns.values()}) < len(columns):
        raise bad(f"question and answer cannot both be {columns['answer']!r}: name two columns", "--answer-column")
    pairs = _pairs(read_set(data), columns, data)
    folder = Path(data).expanduser()
    other = next((found for s in ("valid", "test") if folder.is_dir() and (found := split_file(folder, s))), None)
    if other is not None:
        return pairs, _pairs(read_set(str(other)), columns, str(other))[:max_held_out]
    if len(pairs) < 2:
        raise bad(f"{data} holds {len(pairs)} rows: give at least two, one to train on and one to hold out", "--data")
    cut = len(pairs) - max(1, min(max_held_out, len(pairs) // 10))
    return pairs[:cut], pairs[cut:]


def _pairs(rows: list[Row], columns: Mapping[str, str], name: str) -> list[dict]:
    if "text" in columns:
        texts = [row["text"] for row in with_columns(rows, columns, (), name=name, cells={"text": as_text})]
        found = [{"question": "", "answer": text} for text in texts if text.strip()]
        if not found:
            raise bad(f"{name} has no text in {columns['text']!r}, in none of {len(rows)} rows", "--data")
        return found
    found = []
    for number, row in enumerate(with_columns(rows, columns, (), name=name), start=1):
        try:
            pair = {field: _only(row, field, columns) for field in USUAL}
            about = [as_written(row[own], own) for own in _filled(row, BESIDE) if own not in columns.values()]
        except ValueError as error:
            raise bad(f"{name}, row {number}: {error}", "--data") from error
        found.append({**pair, "question": "\n".join([pair["question"], *about])})
    return found


def _only(row: Row, field: str, columns: Mapping[str, str]) -> str:
    """The question or answer of a row: of the column that was named, or of the one with a usual name."""
    names = [field] if field in columns else [name for name in USUAL[field] if name not in columns.values()]
    found = _filled(row, names)
    if len(found) > 1:
        raise ValueError(f"both {found[0]!r} and {found[1]!r} may be the {field}: --{field}-column NAME says which is")
    empty = next((name for name in names if name in row), None)
    if not found and empty is not None:
        called = columns.get(field, empty)
        raise ValueError(f"the {field} is empty, {called!r} is {row[empty]!r}: fill it in, or leave the row out")
    if not found:
        raise ValueError(
            f"a row needs one of {names} for the {field}; this one has {sorted(map(str, row))}. "
            "--question-column and --answer-column say what they are called; --text-column takes text as it is"
        )
    return as_written(row[found[0]], columns.get(field, found[0]))


def _filled(row: Row, names: Iterable[str]) -> list[str]:
    """Those of the names under which a row has something; 0 is something."""
    return [name for name in names if row.get(name) is not None and str(row[name]).strip()]


def opening(pair: dict) -> str:
    """What a model goes on from: the question, or the first words of a text."""
    return pair["question"] or " ".join(pair["answer"].split()[:8])


def encode_prompt(tokenizer, question: str) -> list[int]:
    """Token ids up to where the answer starts: the model's chat template where it has one."""
    if tokenizer.chat_template is None:
        return tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    # The template has the tokens that begin a text.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(tokenizer, pairs: list[dict], *, max_length: int = 512) -> list[dict]:
    """Rows with `input_ids` and `labels`, -100 on the question; those that have no place for an answer are left out."""
    rows = []
    for pair in pairs:
        prompt = encode_prompt(tokenizer, pair["question"]) if pair["question"] else []
        space = " " if prompt and tokenizer.chat_template is None else ""
        # A token that begins a text has no place between question and answer.
        answer = tokenizer(space + pair["answer"], add_special_tokens=not prompt)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        ids = (prompt + answer)[:max_length]
        if len(prompt) < max_length:  # else the answer is cut off, and there is nothing to learn
            rows.append({"input_ids": ids, "labels": ([-100] * len(prompt) + answer)[:max_length]})
    if len(rows) < len(pairs):
        left_out = f"{len(pairs) - len(rows)} of {len(pairs)} questions have {max_length} tokens or more"
        if not rows:
            first = pairs[0]["question"]
            raise bad(
                f"{left_out}, which leaves no place for an answer: shorten them. The first is {first!r:.60}", "--data"
            )
        typer.echo(f"{left_out}: no place for an answer, they are left out.", err=True)
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
def answers(model, tokenizer, pairs: list[dict], *, max_new_tokens: int = 32) -> list[str]:
    """How the model most likely goes on from each question or text, all in one batch padded on the left."""
    model.eval()
    prompts = [
        encode_prompt(tokenizer, pair["question"]) if pair["question"] else tokenizer(opening(pair))["input_ids"]
        for pair in pairs
    ]
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

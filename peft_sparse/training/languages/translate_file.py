"""A file of rows translated by a saved model: what `peft-sparse translate` does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from ...errors import ConfigError, FormatError
from ...lines import read_lines
from .translate import Row, Translated, translate_rows

TEXT = "text"


def translate_file(
    rows: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: str,
    fields: Sequence[str] | str = (TEXT,),
    adapter: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    show_progress: bool = False,
    **settings: Any,
) -> Translated:
    """Translate a file of rows by a saved model; see `translate_rows`, whose resuming it shares.

    Args:
        rows: a .jsonl file, an object a line, or a text file, whose lines become {"text": line}; no CSV or Parquet.
        output: the .jsonl file to write.
        model: folder or Hub id of a sequence-to-sequence model, in safetensors; it runs on a GPU where there is one.
        fields: names of the fields to translate.
        adapter: folder or Hub id of an adapter for it.
        tokenizer: folder or Hub id, where it is not the model's own: one with a new language's code, say. The
            embeddings grow to its size.
        revision: of the model on the Hub.
        limit: how many rows to translate, from the start; None for all.
        show_progress: show a bar on stderr.
        settings: the other arguments of `translate_rows`.

    Raises:
        ConfigError, FormatError: as `translate_rows`; there is no such file or model, or a line is no JSON object.
    """
    if Path(rows).resolve() == Path(output).resolve():
        raise ConfigError(f"the output {os.fspath(output)!r} is the file of rows itself. Name another file.")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be >= 1 rows, got {limit}.")
    fields = [fields] if isinstance(fields, str) else list(fields)
    found = read_rows(rows)[:limit]
    # Before gigabytes are loaded.
    missing = next(((i, f) for i, row in enumerate(found, 1) for f in fields if not isinstance(row.get(f), str)), None)
    if missing is not None:
        number, field = missing
        raise ConfigError(
            f"{os.fspath(rows)}, row {number} has no text in {field!r}, only the fields {sorted(found[number - 1])}."
        )
    loaded, words = _load(model, adapter, tokenizer or model, revision)
    return translate_rows(found, loaded, words, output, fields=fields, show_progress=show_progress, **settings)


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a .jsonl file, or the lines of a text file as {"text": line}; empty lines left out.

    Raises:
        ConfigError: there is no such file, it has no rows, or it is a table of another kind, such as CSV.
        FormatError: it is not UTF-8, or a line is no JSON object.
    """
    lines = read_lines(path, "rows")
    if not lines.numbered:
        raise ConfigError(f"{lines.file} has no rows.")
    if not lines.are_json:
        return [{TEXT: line} for _, line in lines.numbered]
    return [_row(lines.file, number, value) for number, value in lines.values()]


def _row(file: Path, number: int, value: Any) -> Row:
    if not isinstance(value, Mapping):
        raise FormatError(f"{file}, line {number} is no JSON object: a row has named fields.")
    return dict(value)


def _load(model: str, adapter: str | None, tokenizer: str, revision: str | None) -> tuple[Any, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own = revision if tokenizer == model else None
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        if not config.is_encoder_decoder:
            raise ConfigError(
                f"{model!r} is no sequence-to-sequence model ({config.model_type}); translation models are: NLLB, "
                "M2M-100, mBART, Marian, T5, ..."
            )
        words = AutoTokenizer.from_pretrained(tokenizer, revision=own, trust_remote_code=False)
        loaded = AutoModelForSeq2SeqLM.from_pretrained(
            model, revision=revision, dtype="auto" if device == "cuda" else torch.float32, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{model!r} and its tokenizer {tokenizer!r} cannot be loaded: {reason}") from error
    if len(words) > len(loaded.get_input_embeddings().weight):
        loaded.resize_token_embeddings(len(words), mean_resizing=False)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    return loaded.to(device), words

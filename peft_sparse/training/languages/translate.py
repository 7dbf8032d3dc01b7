"""Rows translated by any sequence-to-sequence model, a batch at a time, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn

from ..._peft_bridge import BaseTunerLayer
from ...checks import is_whole
from ...errors import ConfigError, FormatError
from ...files import one_writer, refuse_home, write_atomically
from ...tuners.common.adapter_config import active_adapters_of
from ..progress import progress_bar

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class Translated:
    """What `translate_rows` wrote.

    Attributes:
        path: the file, a JSON object a line.
        rows: the rows in it.
        num_resumed: how many of them an earlier run had translated.
        num_cut: texts that were longer than the model takes, and were cut (in this run).
        num_unfinished: translations that reached the largest length before their end (in this run).
    """

    path: Path
    rows: list[Row]
    num_resumed: int
    num_cut: int
    num_unfinished: int


@torch.no_grad()
def translate_rows(
    rows: Sequence[Mapping[str, Any]],
    model: Any,
    tokenizer: Any,
    output: str | os.PathLike[str],
    *,
    fields: Sequence[str],
    source: str | None = None,
    target: str | None = None,
    prefix: str = "",
    batch_size: int = 16,
    max_length: int = 256,
    generation: Mapping[str, Any] | None = None,
    show_progress: bool = False,
) -> Translated:
    """Translate fields of labelled rows into a JSONL file; labels, ids and all other fields go along as they are.

    The file appears when all rows are translated. Until then what is done lies beside it (`.<name>.partial`), a batch
    at a time, and the same call goes on from there; when the file is there it is read, and nothing is translated. Calls
    with other rows, settings or weights are refused.

    Args:
        rows: what JSON can hold; `fields` are texts.
        model: a sequence-to-sequence model (NLLB, M2M-100, mBART, Marian, T5, ...), or a PeftModel over one.
        tokenizer: the model's.
        output: the file to write.
        fields: names of the fields to translate.
        source: the tokenizer's code of the rows' language, for tokenizers that have a `src_lang`.
        target: the code of the language to translate into, whose token comes first (`forced_bos_token_id`); None for
            models that know one pair alone, or that are told by a prefix.
        prefix: put before every text ("translate English to German: " for T5).
        batch_size: texts at a time.
        max_length: longest text and longest translation, in subwords.
        generation: more arguments of `generate`, such as {"num_beams": 4}.
        show_progress: show a bar on stderr, if that is a terminal.

    Returns:
        the rows, and how many were cut.

    Raises:
        ConfigError: no rows, a row without a field or with one that is no text, a language that the tokenizer does not
            know, a model that is no sequence-to-sequence model, a file of other rows or settings, or one that another
            process is writing.
        FormatError: what an earlier run left is damaged.

    Source: translate-train of thesis chapter 6, for classification: labels survive translation there.
    """
    output, fields = Path(output), [fields] if isinstance(fields, str) else list(fields)
    _check_rows(rows, fields, batch_size, max_length)
    _check_model(model)
    _check_generation(model, generation or {})
    forced = _set_languages(tokenizer, source, target)
    settings = {
        "fields": fields,
        "source": source,
        "target": target,
        "prefix": prefix,
        "max_length": max_length,
        "generation": dict(generation or {}),
        "model": _fingerprint(model),
        "adapters": _active_adapters(model),
        "tokenizer": _digest_of_tokenizer(tokenizer),
        "rows": _digest(rows),
    }
    notes, partial = (output.with_name(f".{output.name}.{kind}") for kind in ("settings", "partial"))
    refuse_home(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    # What is there already may be read where nothing can be written.
    with nullcontext() if output.exists() else one_writer(output):
        _check_settings(notes, settings, output)
        if output.exists():
            done = list(_read_lines(output, is_whole=True))
            _check_number(output, done, rows, is_whole=True)
            return Translated(output, done, len(done), 0, 0)
        write_atomically(notes, json.dumps(settings, ensure_ascii=False).encode())
        begins = {} if forced is None else {"forced_bos_token_id": forced}
        arguments = {"max_new_tokens": max_length, **(generation or {}), **begins}

        def translate(batch: Sequence[Mapping[str, Any]]) -> tuple[list[Row], int, int]:
            return _translated(
                batch,
                fields,
                lambda texts: _generate(model, tokenizer, [prefix + text for text in texts], max_length, arguments),
            )

        was_training = model.training
        model.eval()
        bar = progress_bar("translating", len(rows)) if show_progress else nullcontext(lambda _: None)
        try:
            with bar as advance:
                found = _translate_rest(rows, partial, translate, max(1, batch_size // len(fields)), advance)
        finally:
            model.train(was_training)
        os.replace(partial, output)
    done, start, num_cut, num_unfinished = found
    for number, what in ((num_cut, "texts were cut"), (num_unfinished, "translations were not at their end")):
        if number:
            logger.warning("%s: %d %s at %d subwords: max_length=...", output, number, what, max_length)
    return Translated(output, done, start, num_cut, num_unfinished)


def _translate_rest(
    rows: Sequence[Mapping[str, Any]],
    partial: Path,
    translate: Callable[[Sequence[Mapping[str, Any]]], tuple[list[Row], int, int]],
    batch_size: int,
    advance: Callable[[int], None],
) -> tuple[list[Row], int, int, int]:
    """Translate what an earlier run left, a batch of rows at a time, each appended to the file `partial` at once.

    Returns:
        all rows; how many were there before; how many texts were cut, and translations unfinished.
    """
    done = list(_read_lines(partial, is_whole=False)) if partial.exists() else []
    _check_number(partial, done, rows, is_whole=False)
    # Batches are those that a run in one go would have had: in float arithmetic a text's neighbours may matter.
    start = len(done) - len(done) % batch_size
    done = done[:start]
    write_atomically(partial, _lines(done))
    advance(start)
    num_cut, num_unfinished = 0, 0
    for first in range(start, len(rows), batch_size):
        batch = [rows[number] for number in range(first, min(first + batch_size, len(rows)))]
        new, cut, unfinished = translate(batch)
        num_cut, num_unfinished = num_cut + cut, num_unfinished + unfinished
        _append(partial, new)
        done += new
        advance(len(batch))
    return done, start, num_cut, num_unfinished


def _translated(
    batch: Sequence[Mapping[str, Any]],
    fields: Sequence[str],
    generate: Callable[[list[str]], tuple[list[str], int, int]],
) -> tuple[list[Row], int, int]:
    """The rows of a batch with translations in `fields`; how many texts were cut, and translations unfinished."""
    texts = [row[field] for row in batch for field in fields]
    # A blank text stays, of which a model would make something up.
    made, cut, unfinished = generate([text for text in texts if text.strip()])
    rest = iter(made)
    found = iter([next(rest) if text.strip() else text for text in texts])
    return [{**row, **{field: next(found) for field in fields}} for row in batch], cut, unfinished


def add_language_code(model: Any, tokenizer: Any, code: str, *, like: str | None = None) -> int:
    """Teach a translation model's tokenizer the code of a new language, and give it a row of the embeddings.

    Train that row with the adapter: `trainable_token_indices=[number]`.

    Args:
        model: whose embeddings grow if need be; not a PeftModel.
        tokenizer: the model's.
        code: the new token, such as "bbc_Latn".
        like: a code that the tokenizer knows, whose row the new one starts from; by default the mean of all rows.

    Returns:
        the token's id.

    Raises:
        ConfigError: the code is there already, `like` is not, or the model has an adapter.
    """
    known = tokenizer.get_vocab()
    if code in known:
        raise ConfigError(f"code: the tokenizer knows {code!r} already, as token {known[code]}.")
    if like is not None and like not in known:
        raise ConfigError(f"like must be a code that the tokenizer knows, got {like!r}.")
    if hasattr(model, "peft_config"):
        raise ConfigError("the model has adapters, whose embeddings cannot grow: add the code before them.")
    tokenizer.add_tokens([AddedToken(code, special=True, normalized=False)], special_tokens=True)
    number = int(tokenizer.convert_tokens_to_ids(code))
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        start = embeddings[known[like]].clone() if like is not None else embeddings.float().mean(0).to(embeddings.dtype)
        if number >= len(embeddings):
            # Without noise: where the row starts is said here.
            model.resize_token_embeddings(number + 1, mean_resizing=False)
        model.get_input_embeddings().weight[number] = start
        output = model.get_output_embeddings()
        if output is not None and output.weight is not model.get_input_embeddings().weight:
            output.weight[number] = output.weight[known[like]] if like is not None else output.weight[:number].mean(0)
    return number


def _check_rows(rows: Sequence[Mapping[str, Any]], fields: list[str], batch_size: int, max_length: int) -> None:
    for name, number in (("batch_size", batch_size), ("max_length", max_length)):
        if not is_whole(number) or number < 1:
            raise ConfigError(f"{name} must be >= 1, got {number!r}")
    if not len(rows) or not fields:
        raise ConfigError(f"there is nothing to translate: {len(rows)} rows, fields {fields}.")
    for number in range(len(rows)):
        row = rows[number]
        wrong = next((field for field in fields if not isinstance(row.get(field), str)), None)
        if wrong is not None:
            raise ConfigError(f"row {number} has no text in {wrong!r}, only the fields {sorted(row)}.")


def _check_model(model: nn.Module) -> None:
    if not getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"model must be a sequence-to-sequence model, such as AutoModelForSeq2SeqLM loads, got "
            f"{type(model).__name__}."
        )


def _check_generation(model: Any, generation: Mapping[str, Any]) -> None:
    own = getattr(getattr(model, "generation_config", None), "num_return_sequences", None)
    if (count := generation.get("num_return_sequences", own)) not in (None, 1):
        raise ConfigError(
            f"num_return_sequences (generation=..., or the model's generation_config) must be 1, got {count}: a row "
            "has one translation."
        )


def _set_languages(tokenizer: Any, source: str | None, target: str | None) -> int | None:
    """Set the source language; returns the token that translations begin with."""
    vocabulary = tokenizer.get_vocab()
    named = {name: _code(vocabulary, code) for name, code in (("source", source), ("target", target)) if code}
    for name, token in named.items():
        if token is None:
            code = source if name == "source" else target
            raise ConfigError(
                f"{name}: the tokenizer has no token of the language {code!r}. Give its own code, such as "
                '"ind_Latn" for NLLB, or add a new one: add_language_code(model, tokenizer, code)'
            )
    if source is not None:
        if not hasattr(tokenizer, "src_lang"):
            raise ConfigError("source: this tokenizer marks no language of its texts; leave it out.")
        tokenizer.src_lang = source
    elif getattr(tokenizer, "src_lang", None):
        logger.warning("The texts are taken for %r, as the tokenizer has it: source=...", tokenizer.src_lang)
    return None if target is None else vocabulary[named["target"]]


def _code(vocabulary: Mapping[str, int], code: str) -> str | None:
    """How the tokenizer writes a language: NLLB and mBART as it is, M2M-100 with underscores around."""
    return next((token for token in (code, f"__{code}__") if token in vocabulary), None)


def _generate(
    model: Any, tokenizer: Any, texts: list[str], max_length: int, arguments: Mapping[str, Any]
) -> tuple[list[str], int, int]:
    """Translations; how many texts were cut; how many translations were."""
    if not texts:
        return [], 0, 0
    lengths = [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
    encoded = tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    encoded = {name: tensor.to(model.device) for name, tensor in encoded.items() if name != "token_type_ids"}
    made = model.generate(**encoded, **arguments)
    ends = tokenizer.eos_token_id
    unfinished = sum(ends is not None and ends not in row[1:] for row in made.tolist())
    found = tokenizer.batch_decode(made, skip_special_tokens=True)
    return [text.strip() for text in found], sum(length > max_length for length in lengths), unfinished


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for number in range(len(rows)):
        try:
            digest.update(json.dumps(rows[number], ensure_ascii=False).encode() + b"\n")
        except (TypeError, ValueError) as error:  # a ValueError: half a character, or a row that holds itself
            raise ConfigError(f"row {number} holds what JSON cannot: {error}") from error
    return digest.hexdigest()


def _check_settings(notes: Path, settings: Mapping[str, Any], output: Path) -> None:
    if not notes.exists():
        if output.exists():
            raise ConfigError(f"{output} is there, and was not written by translate_rows. Name another file.")
        return
    try:
        before = json.loads(notes.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{notes} is damaged: delete it and {output}, and translate again ({error})") from error
    # What an older version did not write down is not compared.
    known = [name for name in settings if name in before]
    changed = [name for name in known if before[name] != json.loads(json.dumps(settings[name]))]
    if changed:
        name = changed[0]
        what = "" if name in ("rows", "model", "tokenizer") else f": {before.get(name)!r} then, {settings[name]!r} now"
        raise ConfigError(f"{output} was begun with other {name}{what}. Name another file, or delete it and {notes}.")


def _read_lines(path: Path, *, is_whole: bool) -> Iterator[Row]:
    """The rows of a file; a last line that a killed run did not finish is left out, unless the file is whole."""
    content = path.read_text(encoding="utf-8", errors="replace" if not is_whole else "strict")
    lines = content.split("\n")
    rest = lines.pop()
    if is_whole and rest:
        raise FormatError(f"{path} ends in the middle of a row: delete it and translate again.")
    for number, line in enumerate(lines):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise FormatError(f"{path}, line {number + 1}, is no JSON: delete the file and translate again.") from error


def _check_number(path: Path, found: Sequence[Row], rows: Sequence[Row], *, is_whole: bool) -> None:
    if len(found) > len(rows) or (is_whole and len(found) < len(rows)):
        raise FormatError(f"{path} holds {len(found)} rows, of {len(rows)}: delete it and translate again.")


def _lines(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _active_adapters(model: Any) -> list[str]:
    """The adapters that translate, which the weights alone do not say."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return [] if any(layer.disable_adapters for layer in layers) else active_adapters_of(model)


def _digest_of_tokenizer(tokenizer: Any) -> str:
    words = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    known = json.dumps([words, str(getattr(tokenizer, "src_lang", None))])
    return hashlib.sha256(known.encode()).hexdigest()


def _append(path: Path, rows: Sequence[Row]) -> None:
    with open(path, "ab") as file:
        file.write(_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def _fingerprint(model: nn.Module) -> str:
    """Tells models apart, adapters included: the first and last values of each parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        ends = torch.cat([flat[:8], flat[-8:]]) if not flat.is_meta else torch.empty(0)
        digest.update(name.encode() + str(parameter.shape).encode() + ends.double().cpu().numpy().tobytes())
    return digest.hexdigest()

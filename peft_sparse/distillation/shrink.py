"""A model folder made smaller, vocabulary and layers, without any training; and adapters that follow it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from ..checkpoints.architecture import class_name_of, read_config
from ..checkpoints.shards import CONFIG, INDEX, WEIGHTS, is_of_checkpoint, refuse_beside_adapter
from ..errors import ConfigError
from ..files import AtomicFolder, check_apart, check_output
from ..lines import read_lines
from .counting import Sameness, by_language
from .student import make_student
from .vocabulary import num_bytes, on_new_texts, reduce_vocabulary

# One text in so many is held out to see how new text fares.
_HELD_OUT = 20


@dataclass(frozen=True)
class Shrunk:
    """What `shrink` wrote.

    Attributes:
        directory: where.
        tokens_before, tokens_after, layers_before, layers_after, parameters_before, parameters_after, bytes_before,
            bytes_after: sizes, bytes being those of the weights.
        counted: {language: how the new tokenizer cuts the texts that were counted}.
        new: {language: how a tokenizer made from 19 texts in 20 cuts the twentieth}: what to expect of other texts.
    """

    directory: Path
    tokens_before: int
    tokens_after: int
    layers_before: int
    layers_after: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    counted: Mapping[str, Sameness]
    new: Mapping[str, Sameness]


def shrink(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    texts: Mapping[str, Sequence[str]],
    stride: int | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    **limits: Any,
) -> Shrunk:
    """Write a model with fewer tokens, and fewer layers if asked for, which plain transformers loads.

    Args:
        model: folder or Hub id, with weights in safetensors and a tokenizer.
        output: folder to write into; it appears when all of it is there.
        texts: {language: texts} to count.
        stride: of `make_student`; None keeps all layers. Without distillation fewer layers mean a worse model.
        revision: of the model on the Hub.
        overwrite: replace a model that is there, with its tokenizer and chat templates.
        limits: of `reduce_vocabulary`: min_count, min_probability, keep_characters.

    Raises:
        ConfigError: see `reduce_vocabulary` and `make_student`; or there is no such model or tokenizer, or the output
            exists.
    """
    check_output(output, overwrite=overwrite, what="model")
    check_apart(output, model=model)
    refuse_beside_adapter(output)
    languages = by_language(texts)
    whole, tokenizer = _load(os.fspath(model), revision)
    sizes = whole.num_parameters(), num_bytes(whole), whole.config.get_text_config().num_hidden_layers
    small = whole if stride is None else make_student(whole, stride=stride, dropout=None)
    del whole
    reduced = reduce_vocabulary(small, tokenizer, texts=languages, **limits)
    new = _held_out(small, tokenizer, languages, limits)
    with AtomicFolder(
        output, overwrite=overwrite, what="model", is_replaced=is_of_checkpoint, doors=(WEIGHTS, INDEX, CONFIG)
    ) as folder:
        reduced.save_pretrained(folder.staging)
    return Shrunk(
        directory=Path(output),
        tokens_before=reduced.tokens_before,
        tokens_after=reduced.tokens_after,
        layers_before=sizes[2],
        layers_after=reduced.model.config.get_text_config().num_hidden_layers,
        parameters_before=sizes[0],
        parameters_after=reduced.parameters_after,
        bytes_before=sizes[1],
        bytes_after=reduced.bytes_after,
        counted=reduced.sameness,
        new=new,
    )


def read_texts(path: str | os.PathLike[str]) -> list[str]:
    """The texts of a file: the lines of a text file, or every text in the rows of a .jsonl file; empty ones left out.

    Raises:
        ConfigError: there is no such file, it holds no text, or it is a table of another kind, such as CSV.
        FormatError: it is not UTF-8, or a row is no JSON.
    """
    lines = read_lines(path, "texts")
    values = lines.values() if lines.are_json else lines.numbered
    found = [text for _, value in values for text in _texts_in(value)]
    if not found:
        raise ConfigError(f"{lines.file} holds no text.")
    return found


def _texts_in(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if value.strip() else []
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inside for text in _texts_in(one)]


def _load(model: str, revision: str | None) -> tuple[PreTrainedModel, Any]:
    config = read_config(model, revision=revision)
    cls = getattr(transformers, class_name_of(config)) if config.architectures else AutoModel
    try:
        loaded = cls.from_pretrained(model, revision=revision, dtype="auto", use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{model!r} has no safetensors weights or no tokenizer that can be loaded: {reason}"
        ) from error
    return loaded, tokenizer


def _held_out(
    model: PreTrainedModel, tokenizer: Any, languages: Mapping[str, Sequence[Any]], limits: Mapping[str, Any]
) -> dict[str, Sameness]:
    counted = {language: [text for i, text in enumerate(ones) if i % _HELD_OUT] for language, ones in languages.items()}
    held_out = {language: ones[::_HELD_OUT] for language, ones in languages.items()}
    if not all(counted.values()):
        return {}
    return on_new_texts(model, tokenizer, counted, held_out, **limits)

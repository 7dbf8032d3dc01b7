"""Taking tokens out of a tokenizer, as functions of the content of its tokenizer.json; nothing else holds its ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ConfigError

WORD_PIECE, UNIGRAM, BPE, WORD_LEVEL = "WordPiece", "Unigram", "BPE", "WordLevel"
KINDS = (WORD_PIECE, UNIGRAM, BPE, WORD_LEVEL)
_BYTES = 256
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def check_kind(spec: Mapping[str, Any]) -> None:
    """Refuse a tokenizer of a kind whose tokens cannot be taken out.

    Raises:
        ConfigError: it is none of `KINDS`.
    """
    kind = spec["model"].get("type")
    if kind not in KINDS:
        raise ConfigError(f"the tokenizer's model must be one of {list(KINDS)}, got {kind!r}.")


def vocabulary_of(spec: Mapping[str, Any]) -> dict[int, str]:
    """{id: token} of everything a tokenizer can give, added tokens included, in the order of the ids."""
    vocab = spec["model"]["vocab"]
    tokens = (
        dict(enumerate(piece for piece, _ in vocab))
        if isinstance(vocab, list)
        else {index: token for token, index in vocab.items()}
    )
    tokens.update({added["id"]: added["content"] for added in spec["added_tokens"]})
    return dict(sorted(tokens.items()))


def always_kept(spec: Mapping[str, Any], *, characters: bool = True) -> set[int]:
    """Ids that no reduction may take: special tokens, single characters, bytes, and what the tokenizer itself names.

    Of Unigram also the piece of the lowest score, from which the cost of an unknown character is reckoned.

    Args:
        spec: content of the tokenizer.json.
        characters: False leaves single characters out, for which bytes can stand in.

    Raises:
        ConfigError: characters are to be left out, and there are no bytes that could stand in.
    """
    model = spec["model"]
    kept = {added["id"] for added in spec["added_tokens"] if added["special"]}
    kept |= _ids_of_post_processor(spec.get("post_processor") or {})
    if spec.get("padding"):
        kept.add(spec["padding"]["pad_id"])
    tokens = vocabulary_of(spec)
    if model.get("unk_token") is not None:
        kept |= {index for index, token in tokens.items() if token == model["unk_token"]}
    if model["type"] == UNIGRAM:
        scores = [score for _, score in model["vocab"]]
        kept |= {scores.index(min(scores))} if scores else set()
        kept |= {model["unk_id"]} if model.get("unk_id") is not None else set()
    data = {index for index, token in tokens.items() if _BYTE.fullmatch(token)}
    if not characters and (len(data) < _BYTES or not model.get("byte_fallback")):
        raise ConfigError(
            "keep_characters=False needs a tokenizer that writes unknown characters in bytes (byte_fallback, with all "
            f"{_BYTES} of them); this one is {model['type']} with {len(data)}. Keep the characters."
        )
    return kept | (data if not characters else {index for index, token in tokens.items() if _is_single(token, model)})


def _is_single(token: str, model: Mapping[str, Any]) -> bool:
    if len(token) == 1 or _BYTE.fullmatch(token):
        return True
    if model["type"] == WORD_LEVEL:
        return False
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    bare = token.removeprefix(prefix)
    return len(bare) == 1 or len(bare.removesuffix(suffix)) == 1


def _ids_of_post_processor(processor: Mapping[str, Any]) -> set[int]:
    kind = processor.get("type")
    if kind == "Sequence":
        return {index for one in processor["processors"] for index in _ids_of_post_processor(one)}
    if kind == "TemplateProcessing":
        return {index for one in processor["special_tokens"].values() for index in one["ids"]}
    return {processor[name][1] for name in ("sep", "cls") if isinstance(processor.get(name), list)}


def with_ancestors(spec: Mapping[str, Any], seen: Iterable[int]) -> set[int]:
    """Some ids, and those of every token that a merge on the way to one of them may make.

    Of BPE these are the parts of all merges that give a token, not only of the first: which of them a text takes
    depends on what is around it. The other kinds have no merges.
    """
    closed = set(seen)
    model = spec["model"]
    if model["type"] != BPE:
        return closed
    ids, parts = model["vocab"], dict[str, list[str]]()
    for left, right in _merges(model):
        parts.setdefault(_merged(left, right, model), []).extend((left, right))
    names = {index: token for token, index in ids.items()}
    waiting = [names[index] for index in closed if index in names]
    while waiting:
        for part in parts.pop(waiting.pop(), ()):
            if part in ids and ids[part] not in closed:
                closed.add(ids[part])
                waiting.append(part)
    return closed


def _merges(model: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _merged(left: str, right: str, model: Mapping[str, Any]) -> str:
    return left + right[len(model.get("continuing_subword_prefix") or "") :]


def word_pieces(word: str, spec: Mapping[str, Any]) -> set[int]:
    """Ids of the pieces that WordPiece takes, longest first, until it finds no piece for the rest of a word.

    Without them an unknown word could become a known one: the rest might be cut at another place.
    """
    model = spec["model"]
    ids, prefix = model["vocab"], model["continuing_subword_prefix"]
    found, start = set[int](), 0
    while start < len(word) <= model["max_input_chars_per_word"]:
        for end in range(len(word), start, -1):
            piece = (prefix if start else "") + word[start:end]
            if piece in ids:
                found.add(ids[piece])
                start = end
                break
        else:
            break
    return found


def renumbered(spec: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """The content of a tokenizer.json that has only some of the tokens, under new ids.

    Args:
        spec: of the whole tokenizer; not modified.
        new_ids: {id: new id} of the tokens that stay, in the same order.
    """
    model = dict(spec["model"])
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [entry for index, entry in enumerate(vocab) if index in new_ids]
    else:
        ordered = sorted(vocab.items(), key=lambda pair: pair[1])
        model["vocab"] = {token: new_ids[index] for token, index in ordered if index in new_ids}
    if model.get("unk_id") is not None:
        model["unk_id"] = new_ids[model["unk_id"]]
    if model["type"] == BPE:
        left = model["vocab"]
        model["merges"] = [
            [a, b] for a, b in _merges(model) if a in left and b in left and _merged(a, b, model) in left
        ]
    reduced = {**spec, "model": model}
    added = [token for token in spec["added_tokens"] if token["id"] in new_ids]
    reduced["added_tokens"] = [{**token, "id": new_ids[token["id"]]} for token in added]
    if spec.get("post_processor"):
        reduced["post_processor"] = _renumbered_processor(spec["post_processor"], new_ids)
    if spec.get("padding"):
        reduced["padding"] = {**spec["padding"], "pad_id": new_ids[spec["padding"]["pad_id"]]}
    return reduced


def _renumbered_processor(processor: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    changed = dict(processor)
    if processor["type"] == "Sequence":
        changed["processors"] = [_renumbered_processor(one, new_ids) for one in processor["processors"]]
    elif processor["type"] == "TemplateProcessing":
        changed["special_tokens"] = {
            name: {**one, "ids": [new_ids[index] for index in one["ids"]]}
            for name, one in processor["special_tokens"].items()
        }
    else:
        for name in ("sep", "cls"):
            if isinstance(processor.get(name), list):
                token, index = processor[name]
                changed[name] = [token, new_ids[index]]
    return changed

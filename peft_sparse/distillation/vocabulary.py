"""A model and its tokenizer with only the tokens that some texts use: smaller embeddings, the same results on them."""

from __future__ import annotations

import copy
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import is_number, is_whole, nearest
from ..errors import ConfigError
from .counting import Sameness, Text, by_language, compare, count
from .resized import check_model, ids_in_configs, position_pad_id, with_rows
from .rows import VocabularyRows
from .tokenizer_json import always_kept, check_kind, renumbered, vocabulary_of, with_ancestors

logger = logging.getLogger(__name__)

_KEEP = "keep_texts"


@dataclass(frozen=True, eq=False)
class ReducedVocabulary:
    """What `reduce_vocabulary` gives.

    Attributes:
        model: the smaller model; shares no memory with the one that was given.
        tokenizer: its tokenizer.
        rows: which rows of the vocabulary's matrices stayed; what `reduce_adapter` needs.
        tokens_before, tokens_after: tokens of the tokenizers.
        sameness: {language: how both tokenizers cut its texts}, `keep_texts` left out.
        parameters_before, parameters_after: numbers in both models.
        bytes_before, bytes_after: their memory.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: VocabularyRows
    tokens_before: int
    tokens_after: int
    sameness: Mapping[str, Sameness]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int

    @property
    def kept(self) -> Tensor:
        """[n] int64: the old row of each new one."""
        return self.rows.kept

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write model, tokenizer and `rows` into a directory, which plain transformers loads from."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        self.rows.save(directory)


def reduce_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: Mapping[str, Iterable[Text]] | Iterable[Text],
    keep_texts: Iterable[Text] = (),
    keep_tokens: Iterable[str] = (),
    min_count: int = 1,
    min_probability: float = 0.0,
    keep_characters: bool = True,
) -> ReducedVocabulary:
    """Keep the tokens that texts use, and drop all others from tokenizer, embeddings, output matrix and configs.

    Old rows keep their order. The texts are tokenised as before, which is checked before anything is returned, and the
    model computes the same on them, bit for bit where its output matrix is not involved. Why that is so: WordPiece
    takes the longest piece that fits, and taking away pieces that it did not take changes none of its choices; Unigram
    takes the best path, which stays the best when others go; BPE always applies the first of the merges that are
    possible, which is still there and still the first, since all intermediate results are kept as well. Other texts are
    cut further where they use a token that went. They get no unknown tokens for it where the tokenizer has a token for
    each of their characters or bytes: these always stay, and so do special tokens.

    Args:
        model: a model of transformers, not quantised and without adapters (`reduce_adapter` is for these).
        tokenizer: its tokenizer, of a kind that has a tokenizer.json.
        texts: {language: texts}, or texts alone, each a text or a list of words; they stay in memory. Give what the
            model will be used on, task data included. A chat template's own words count only if they are in a text.
        keep_texts: texts whose tokens stay, however rare; they are checked like `texts`.
        keep_tokens: tokens that stay, as the tokenizer spells them.
        min_count: how often a token must occur in one of the languages.
        min_probability: its least share of the tokens of one of the languages, in [0, 1). The thesis has 1e-6. With
            this or `min_count` above 1, texts with tokens that are rarer are cut differently; `sameness` says how many.
        keep_characters: False drops characters that no text uses, if the tokenizer can write them in bytes. Gemma's
            Chinese characters are an example.

    Returns:
        the smaller model and tokenizer; neither of those given is changed.

    Raises:
        ConfigError: a setting, the model or the tokenizer cannot be honoured; or a text would be cut differently though
            all its tokens stay, which is then quoted.

    Cost: the texts are tokenised three times; the memory of the smaller model.
    Source: Abdaoui et al. 2020, arXiv:2010.05609; BiStil (Ansell et al. 2023), section 3.1, with the unigram threshold.
        Differs from both in that merges are closed over, nothing that an id is held in is left out, and all is checked.
    """
    _check_limits(min_count, min_probability)
    check_model(model)
    languages = by_language(texts)
    kept_texts = [text for ones in by_language(keep_texts, name="keep_texts").values() for text in ones]
    empty = [language for language, ones in languages.items() if not any(ones)]
    if empty or not languages:
        of = f" of {empty[0]!r}" if empty and isinstance(texts, Mapping) else ""
        raise ConfigError(f"texts must hold at least one text{of}, got none. An iterator may have been used up.")
    wanted = _Wanted(languages, min_count, min_probability, keep_characters, kept_texts, keep_tokens)
    spec, tokens, new_ids, smaller, smaller_spec = _renumbering(model, tokenizer, wanted)
    size = model.get_input_embeddings().weight.shape[0]
    sameness = compare(spec, smaller_spec, new_ids, {**languages, _KEEP: kept_texts})
    _check_sameness(sameness if min_count <= 1 and not min_probability else {_KEEP: sameness[_KEEP]})
    rows = torch.tensor([old for old in new_ids if old < size])
    reduced, tensors = with_rows(model, rows, new_ids)
    result = ReducedVocabulary(
        model=reduced,
        tokenizer=smaller,
        rows=VocabularyRows(rows, size, tensors),
        tokens_before=len(tokens),
        tokens_after=sum(old in new_ids for old in tokens),
        sameness={language: sameness[language] for language in languages},
        parameters_before=model.num_parameters(),
        parameters_after=reduced.num_parameters(),
        bytes_before=num_bytes(model),
        bytes_after=num_bytes(reduced),
    )
    logger.info("Kept %d of %d tokens", result.tokens_after, result.tokens_before)
    return result


def on_new_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    counted: Mapping[str, list[Text]],
    new: Mapping[str, list[Text]],
    *,
    min_count: int = 1,
    min_probability: float = 0.0,
    keep_characters: bool = True,
) -> dict[str, Sameness]:
    """How a tokenizer that some texts were counted for would cut other ones; arguments as in `reduce_vocabulary`."""
    wanted = _Wanted(counted, min_count, min_probability, keep_characters)
    spec, _, new_ids, _, smaller_spec = _renumbering(model, tokenizer, wanted)
    return compare(spec, smaller_spec, new_ids, new)


@dataclass(frozen=True)
class _Wanted:
    """What decides which tokens stay; see `reduce_vocabulary`."""

    languages: Mapping[str, list[Text]]
    min_count: int
    min_probability: float
    keep_characters: bool
    keep_texts: Sequence[Text] = ()
    keep_tokens: Iterable[str] = ()


class _Renumbering(NamedTuple):
    """A tokenizer before and after: its tokenizer.json, its tokens, {old id: new id}, the smaller one, and its file."""

    spec: dict[str, Any]
    tokens: dict[int, str]
    new_ids: dict[int, int]
    smaller: PreTrainedTokenizerBase
    smaller_spec: dict[str, Any]


def _renumbering(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: _Wanted) -> _Renumbering:
    spec = spec_of(tokenizer)
    tokens = vocabulary_of(spec)
    size = model.get_input_embeddings().weight.shape[0]
    counted = count(spec, wanted.languages, max(tokens) + 1)
    used = counted.used(min_count=wanted.min_count, min_probability=wanted.min_probability)
    used |= count(spec, {"": list(wanted.keep_texts)}, max(tokens) + 1).used() | _ids_of(wanted.keep_tokens, tokens)
    kept = with_ancestors(spec, used) | always_kept(spec, characters=wanted.keep_characters) | ids_in_configs(model)
    first = position_pad_id(model)
    new_ids = {old: new for new, old in enumerate(_in_order(kept | set(range(first)), tokens, size))}
    if new_ids.get(first) != first:
        raise ConfigError(
            f"{type(model).__name__} counts positions from the pad id {first}, which would move, since rows below it "
            "belong to no token. Give the model and the tokenizer that belong together."
        )
    smaller = _with_spec(tokenizer, renumbered(spec, new_ids))
    smaller_spec = spec_of(smaller)
    _check_tokens(tokens, vocabulary_of(smaller_spec), new_ids)
    return _Renumbering(spec, tokens, new_ids, smaller, smaller_spec)


def spec_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of a tokenizer's tokenizer.json.

    Raises:
        ConfigError: it has none, or one of a kind that cannot be reduced.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ConfigError(
            f"{type(tokenizer).__name__} has no tokenizer.json: it is written in Python, or made of another file. "
            "Load it with AutoTokenizer, which converts most of them."
        )
    spec = json.loads(backend.to_str())
    check_kind(spec)
    return spec


def num_bytes(model: PreTrainedModel) -> int:
    """Memory of a model's parameters, shared ones counted once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def _check_limits(min_count: int, min_probability: float) -> None:
    if not is_whole(min_count) or min_count < 1:
        raise ConfigError(f"min_count must be a whole number >= 1, got {min_count!r}.")
    if not is_number(min_probability) or not 0 <= min_probability < 1:
        raise ConfigError(f"min_probability must be in [0, 1), got {min_probability!r}. The thesis has 1e-6.")


def _ids_of(names: Iterable[str], tokens: Mapping[int, str]) -> set[int]:
    if isinstance(names, str):
        raise ConfigError(f"keep_tokens must be a list of tokens, got one: write [{names!r}].")
    ids = {token: index for index, token in tokens.items()}
    wanted = list(names)  # an iterator gives them once
    for name in wanted:
        if name not in ids:
            raise ConfigError(f"keep_tokens: the tokenizer has no token {name!r}.{nearest(name, ids)}")
    return {ids[name] for name in wanted}


def _in_order(kept: set[int], tokens: Mapping[int, str], size: int) -> list[int]:
    """Kept ids by their new ones: tokens, then rows without a token, then tokens without a row; each in old order."""
    places = {old: (old >= size, old not in tokens, old) for old in kept if old in tokens or old < size}
    return sorted(places, key=lambda old: places[old])


def _with_spec(tokenizer: PreTrainedTokenizerBase, spec: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer with another tokenizer.json, loaded as a user would load it: nothing of the old one is left."""
    changed = copy.deepcopy(tokenizer)
    changed._tokenizer = Tokenizer.from_str(json.dumps(spec))
    with tempfile.TemporaryDirectory() as folder:
        changed.save_pretrained(folder)
        loaded = type(tokenizer).from_pretrained(folder)
    loaded.name_or_path = tokenizer.name_or_path
    return loaded


def _check_tokens(before: Mapping[int, str], after: Mapping[int, str], new_ids: Mapping[int, int]) -> None:
    expected = {new: before[old] for old, new in new_ids.items() if old in before}
    if expected != after:
        wrong = sorted(index for index in expected.keys() | after.keys() if expected.get(index) != after.get(index))
        raise ConfigError(
            f"the tokenizer gives tokens other ids than its file says: {len(wrong)} of them, such as "
            f"{expected.get(wrong[0])!r} (should be {wrong[0]}). Save it, load it anew and try again."
        )


def _check_sameness(sameness: Mapping[str, Sameness]) -> None:
    for language, found in sameness.items():
        if found.first is not None:
            raise ConfigError(
                f"{found.texts - found.same} of {found.texts} texts of {language!r} would be tokenised differently, "
                f"the first of which is {found.first!r:.200}. The tokenizer does more than its file says."
            )

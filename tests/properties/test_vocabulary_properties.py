"""The law of vocabulary reduction: counted text is tokenised as before, whatever tokenizer and whatever text."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from peft_sparse.distillation.counting import compare, count
from peft_sparse.distillation.tokenizer_json import always_kept, renumbered, vocabulary_of, with_ancestors
from tests.support.laws import examples
from tests.support.tokenizers import KINDS, all_words, make, random_texts


def reduce(tokenizer: Tokenizer, texts: list[str], **limits) -> tuple[dict, dict, dict[int, int]]:
    """(tokenizer.json before, after, new ids), with only what the texts use and what always stays."""
    spec = json.loads(tokenizer.to_str())
    used = count(spec, {"texts": texts}, max(vocabulary_of(spec)) + 1).used(**limits)
    kept = sorted(with_ancestors(spec, used) | always_kept(spec))
    new_ids = {old: new for new, old in enumerate(kept)}
    return spec, renumbered(spec, new_ids), new_ids


@pytest.mark.parametrize("kind", KINDS)
@examples(100)
@given(seed=st.integers(0, 2**32), texts=st.integers(1, 4))
def test_counted_text_is_tokenised_identically(kind, seed, texts):
    rng = random.Random(seed)
    tokenizer = make(kind, rng)
    counted = random_texts(rng, texts)
    before, after, new_ids = reduce(tokenizer, counted)
    found = compare(before, after, new_ids, {"counted": counted})["counted"]
    assert found.first is None
    assert found.same == found.texts == texts
    # The comparison itself, by the library's tokens.
    new, old = Tokenizer.from_str(json.dumps(after)), Tokenizer.from_str(json.dumps(before))
    for one in (new, old):
        one.no_truncation()
        one.no_padding()
    for text in counted:
        assert new.encode(text).tokens == old.encode(text).tokens
        assert [new_ids[index] for index in old.encode(text, text).ids] == new.encode(text, text).ids


@pytest.mark.parametrize("kind", KINDS)
@examples(30)
@given(seed=st.integers(0, 2**32))
def test_order_and_names_of_what_stays(kind, seed):
    rng = random.Random(seed)
    before, after, new_ids = reduce(make(kind, rng), random_texts(rng, 2))
    olds, news = vocabulary_of(before), vocabulary_of(after)
    assert list(news) == list(range(len(new_ids)))
    assert list(news.values()) == [olds[old] for old in sorted(new_ids)]
    built = Tokenizer.from_str(json.dumps(after))
    assert {token: built.token_to_id(token) for token in news.values()} == {t: i for i, t in news.items()}
    singles = {token for token in olds.values() if len(token) == 1 or token.startswith("<0x")}
    assert singles <= set(news.values())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "WordLevel"])
@examples(30)
@given(seed=st.integers(0, 2**32))
def test_a_known_character_never_becomes_unknown(kind, seed):
    rng = random.Random(seed)
    tokenizer = make(kind, rng)
    before, after, _ = reduce(tokenizer, random_texts(rng, 1))
    old, new = Tokenizer.from_str(json.dumps(before)), Tokenizer.from_str(json.dumps(after))
    unknown = {"[UNK]", "<unk>"}
    for word in all_words(3):
        if not unknown & set(old.encode(word, add_special_tokens=False).tokens):
            own = [word[0], *("##" + one for one in word[1:])] if kind == "WordPiece" else list(word)
            if kind != "byte-fallback BPE" and not all(one in old.get_vocab() for one in own):
                continue  # a longer piece may go round a letter that has no token of its own
            assert not unknown & set(new.encode(word, add_special_tokens=False).tokens), word

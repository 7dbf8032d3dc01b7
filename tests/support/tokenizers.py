"""Tokenizers of all kinds with vocabularies of a few tokens, and models to go with them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import BatchEncoding, BertForMaskedLM, PreTrainedTokenizerFast

from tests.support.models import bert, llama

LETTERS = "abcd"
# In those letters.
TEXTS = ["abab cdc aab", "dcba abba cc"]
KINDS = ("WordPiece", "Unigram", "BPE", "byte BPE", "byte-fallback BPE", "WordLevel")


def random_pieces(rng: random.Random, count: int, *, longest: int = 5, letters: str = LETTERS) -> list[str]:
    """Different pieces of two letters and more."""
    words = ("".join(rng.choices(letters, k=rng.randint(2, longest))) for _ in range(count))
    return list(dict.fromkeys(words))


def word_piece(rng: random.Random, count: int = 150) -> Tokenizer:
    """Some letters are missing at random, so that words may be unknown."""
    singles = [one for one in LETTERS if rng.random() < 0.9] + ["##" + one for one in LETTERS if rng.random() < 0.6]
    pieces = [rng.choice(["", "##"]) + piece for piece in random_pieces(rng, count)]
    tokens = list(dict.fromkeys(["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *singles, *pieces]))
    rest = tokens[6:]
    rng.shuffle(rest)
    tokens[6:] = rest
    ids = {token: index for index, token in enumerate(tokens)}
    made = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=20))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    made.enable_truncation(4)
    made.enable_padding(pad_id=ids["[PAD]"], pad_token="[PAD]", length=4)
    return made


def unigram(rng: random.Random, count: int = 100, *, byte_fallback: bool = False) -> Tokenizer:
    """Scores from a few values, so that paths tie, and some letters missing, so that their cost counts."""
    letters = [one for one in [*LETTERS, "▁"] if rng.random() < 0.6]
    spread = rng.choice([3, 12, 25])
    extra = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    pieces = [rng.choice(["", "▁"]) + piece for piece in random_pieces(rng, count)]
    tokens = list(dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>", *extra, *pieces, *letters]))
    scored = [(token, -float(rng.randint(1, spread))) for token in tokens]
    if rng.random() < 0.5:  # a rare piece, from whose score the cost of unknown characters is reckoned
        scored.append(("dcba" * 3, -60.0))
    made = Tokenizer(models.Unigram(scored, unk_id=3, byte_fallback=byte_fallback))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    made.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return made


def bpe(
    rng: random.Random,
    *,
    byte_level: bool = False,
    byte_fallback: bool = False,
    merges: int = 200,
    ignore_merges: bool = False,
    suffix: str = "",
) -> Tokenizer:
    """Merges at random, most tokens by several of them, in no order that training would give."""
    alphabet = [*LETTERS, "Ġ"] if byte_level else [*LETTERS, "▁"]
    if byte_level:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<unk>", "<pad>", "<s>", "</s>"]
    extra = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    singles = alphabet + ([one + suffix for one in LETTERS] if suffix else [])
    tokens = list(dict.fromkeys([*specials, *extra, *singles]))
    starts = [*LETTERS, "Ġ" if byte_level else "▁"]
    usable, found = starts + [one + suffix for one in LETTERS if suffix], []
    for _ in range(merges):
        left, right = rng.choice(usable), rng.choice(usable)
        if len(left + right) <= 8 and (not suffix or not left.endswith(suffix)) and (left, right) not in found:
            found.append((left, right))
            usable.append(left + right)
            tokens.append(left + right)
    pairs = [  # every other way to make the same tokens
        (token[:cut], token[cut:])
        for token in usable
        for cut in range(1, len(token))
        if {token[:cut], token[cut:]} <= set(usable)
    ]
    found = list(dict.fromkeys([*found, *pairs]))
    rng.shuffle(found)
    rest = list(dict.fromkeys(tokens[4:]))
    rng.shuffle(rest)
    ids = {token: index for index, token in enumerate([*specials, *rest])}
    settings: dict[str, Any] = {"end_of_word_suffix": suffix} if suffix else {}
    unknown = None if byte_level else "<unk>"
    made = Tokenizer(
        models.BPE(ids, found, unk_token=unknown, byte_fallback=byte_fallback, ignore_merges=ignore_merges, **settings)
    )
    if byte_level:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    elif byte_fallback:
        made.normalizer = normalizers.Replace(" ", "▁")
    else:
        made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(specials)
    made.add_tokens(["<unused0>", "dd  dd"])
    made.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
            ),
        ]
    )
    return made


def word_level(rng: random.Random, count: int = 40) -> Tokenizer:
    """Whole words only."""
    tokens = ["<pad>", "<unk>", *random_pieces(rng, count), *LETTERS]
    made = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<pad>", "<unk>"])
    return made


def make(kind: str, rng: random.Random) -> Tokenizer:
    """A tokenizer of one of `KINDS`."""
    return {
        "WordPiece": lambda: word_piece(rng),
        "Unigram": lambda: unigram(rng, byte_fallback=rng.random() < 0.3),
        "BPE": lambda: bpe(rng, suffix=rng.choice(["", "</w>"])),
        "byte BPE": lambda: bpe(rng, byte_level=True, ignore_merges=rng.random() < 0.3),
        "byte-fallback BPE": lambda: bpe(rng, byte_fallback=True),
        "WordLevel": lambda: word_level(rng),
    }[kind]()


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> BatchEncoding:
    return tokenizer(text, truncation=False, padding=False, return_tensors="pt")


def random_texts(rng: random.Random, count: int) -> list[str]:
    """Texts of the letters that tokenizers know, of some that they may not, and of special tokens."""
    letters, rare = LETTERS * 4 + "   ", "eé字😀\n"
    texts = []
    for _ in range(count):
        text = "".join(rng.choice(rare if rng.random() < 0.03 else letters) for _ in range(rng.choice([3, 10, 40])))
        texts.append(text + rng.choice(["", "", "", "[MASK]b", "<mask>ab", "<s>", "dd  dd"]))
    return texts


def fast(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    """As transformers holds it; special tokens by what this vocabulary calls them."""
    names = {
        "pad_token": ("[PAD]", "<pad>"),
        "unk_token": ("[UNK]", "<unk>"),
        "cls_token": ("[CLS]", "<s>"),
        "sep_token": ("[SEP]", "</s>"),
        "mask_token": ("[MASK]", "<mask>"),
        "bos_token": ("<s>",),
        "eos_token": ("</s>",),
    }
    known = tokenizer.get_vocab()
    found = {role: next((token for token in tokens if token in known), None) for role, tokens in names.items()}
    given = {role: token for role, token in {**found, **special}.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given)


def of_words(words: Iterable[str], *, unk: str = "<unk>", **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows these words, each by its place, and takes text apart at spaces and punctuation."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unk))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast(made, unk_token=unk, **special)


def make_bert(size: int, *, cls: type = BertForMaskedLM, **changes: Any) -> Any:
    """A BERT over a vocabulary of some size, which equals other sizes of the model if it is 32."""
    sizes = {"num_hidden_layers": 4, "intermediate_size": 32, "max_position_embeddings": 64}
    model = bert(cls, **{"vocab_size": size, **sizes, **changes})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def make_llama(size: int, **changes: Any) -> nn.Module:
    """A Llama over a vocabulary of some size."""
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    return llama(**{"vocab_size": size, "max_position_embeddings": 64, **sizes, **changes})


def all_words(longest: int) -> list[str]:
    """Every word of the letters up to a length."""
    return ["".join(word) for length in range(1, longest + 1) for word in itertools.product(LETTERS, repeat=length)]

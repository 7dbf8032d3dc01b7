"""A tiny parser, a tokenizer whose words fall into two pieces, and a toy treebank."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from peft_sparse import BiaffineParser

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LABELS = ["det", "nsubj", "obj", "root"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
DETERMINERS, NOUNS, VERBS = ["the", "a"], ["dogs", "cats", "birds", "boats"], ["sees", "hears", "finds"]
PIECES = [*DETERMINERS, *(piece for word in NOUNS + VERBS for piece in (word[:2], f"##{word[2:]}"))]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *dict.fromkeys(PIECES)])}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names)


def sentences(count: int, *, seed: int = 0) -> list[dict]:
    """det noun verb det noun, either noun phrase without its determiner at times: lengths of 3 to 5 words."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        words, heads, relations = [], [], []
        for bit, relation in enumerate(("nsubj", "obj")):
            if number >> bit & 1:
                words.append(chance.choice(DETERMINERS))
                heads.append(len(words) + 1)
                relations.append("det")
            words.append(chance.choice(NOUNS))
            heads.append(None)
            relations.append(relation)
            if relation == "nsubj":
                words.append(chance.choice(VERBS))
                heads.append(0)
                relations.append("root")
                verb = len(words)
        found.append({"words": words, "heads": [verb if h is None else h for h in heads], "relations": relations})
    return found


def encoder_config(**fields) -> BertConfig:
    return BertConfig(
        **SIZES, vocab_size=len(SPECIAL) + len(set(PIECES)), max_position_embeddings=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **fields,
    )  # fmt: skip


def encoder(seed: int = 0) -> BertModel:
    torch.manual_seed(seed)
    return BertModel(encoder_config())


def parser(*, seed: int = 0, heads: float = 0.3, **settings):
    """A parser with random heads."""
    torch.manual_seed(seed)
    made = BiaffineParser.from_config(encoder_config(), **{"labels": LABELS, **settings})
    for weight in (made.biaffine_arcs.weight, made.biaffine_rels.weight):
        torch.nn.init.normal_(weight, std=heads)
    return made.eval()

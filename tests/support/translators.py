"""Tiny translators of words, their tokenizer, and rows to translate."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

SPECIAL = ["<pad>", "</s>", "<unk>", "ind_Latn", "ace_Latn"]
WORDS = [f"w{i}" for i in range(12)]
SMALL = {"vocab_size": len(SPECIAL) + len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
SIZES = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.0,
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=["ind_Latn", "ace_Latn"], model_max_length=40,
    )  # fmt: skip


def bart() -> BartForConditionalGeneration:
    return BartForConditionalGeneration(
        BartConfig(**SMALL, **SIZES, bos_token_id=None, forced_eos_token_id=None, max_position_embeddings=64)
    )


def marian() -> MarianMTModel:
    return MarianMTModel(MarianConfig(**SMALL, **SIZES, forced_eos_token_id=None, max_position_embeddings=64))


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(**SMALL, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0)
    )


MODELS = {"bart": bart, "marian": marian, "t5": t5}


# Draws whose translations differ from text to text; a random Marian says the same of everything.
SEEDS = {"bart": 2, "marian": 0, "t5": 1}


def made(kind: str, *, seed: int | None = None):
    torch.manual_seed(SEEDS[kind] if seed is None else seed)
    model = MODELS[kind]()
    # Marian's positions are sines, and in no file.
    for name, parameter in model.named_parameters():
        if "embed_positions" not in name or kind != "marian":
            parameter.data.normal_()
    return model.eval()


def rows(count: int = 7) -> list[dict]:
    chance = random.Random(0)
    return [
        {"id": i, "text": " ".join(chance.choices(WORDS, k=chance.randint(2, 6))), "label": "ab"[i % 2]}
        for i in range(count)
    ]


def bert() -> BertForMaskedLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForMaskedLM(BertConfig(vocab_size=20, **sizes))

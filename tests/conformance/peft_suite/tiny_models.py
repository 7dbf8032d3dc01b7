"""Tiny stand-ins for the Hub models of PEFT's tests.

`from_pretrained("peft-internal-testing/tiny-random-X")` takes a relative folder of that name before it asks the Hub, so
the suite runs offline in a folder that holds these. Weights come from a fixed seed, with a wider spread than
transformers' default: at 0.02 the logits of a two-layer model are so flat that "the adapter changes the output"
compares noise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 128
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_TOKENS, "max_position_embeddings": 64, "initializer_range": 0.2}
_GROUPED = {
    **_DECODER,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_BERT = {
    **_DECODER,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def _model(kind: str, config: str, **values: Any) -> Callable[[], transformers.PreTrainedModel]:
    def build() -> transformers.PreTrainedModel:
        return getattr(transformers, kind)(getattr(transformers, config)(**values))

    return build


def _opt(**changes: Any) -> Callable[[], transformers.PreTrainedModel]:
    sizes = {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
    }
    return _model(
        "OPTForCausalLM", "OPTConfig", **{**_TOKENS, "max_position_embeddings": 64, "init_std": 0.2, **sizes, **changes}
    )


def _gpt2() -> Callable[[], transformers.PreTrainedModel]:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    return _model("GPT2LMHeadModel", "GPT2Config", **{**_TOKENS, **sizes})


MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt(),
    # Quantised to FP4: through twelve layers of a wide spread its noise alone reaches the tests' tolerance.
    "peft-internal-testing/opt-125m": _opt(
        hidden_size=64, ffn_dim=128, word_embed_proj_dim=64, num_hidden_layers=12, init_std=0.02
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _gpt2(),
    "hf-internal-testing/tiny-random-gpt2": _gpt2(),
    "gpt2": _gpt2(),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": _model(
        "GPTJForCausalLM",
        "GPTJConfig",
        **{
            **_TOKENS,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "rotary_dim": 4,
            "initializer_range": 0.2,
        },
    ),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": _model("LlamaForCausalLM", "LlamaConfig", **_GROUPED),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _model("LlamaForCausalLM", "LlamaConfig", **_GROUPED),
    "peft-internal-testing/tiny-dummy-qwen2": _model("Qwen2ForCausalLM", "Qwen2Config", **_GROUPED),
    "hf-internal-testing/tiny-random-MistralForCausalLM": _model("MistralForCausalLM", "MistralConfig", **_GROUPED),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _model(
        "Gemma3ForCausalLM", "Gemma3TextConfig", **{**_GROUPED, "head_dim": 8, "sliding_window": 32}
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": _model(
        "BloomForCausalLM",
        "BloomConfig",
        **{**_TOKENS, "hidden_size": 16, "n_layer": 5, "n_head": 4, "initializer_range": 0.2},
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": _model(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        **{**_DECODER, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _model(
        "BartForConditionalGeneration",
        "BartConfig",
        **{
            **_TOKENS,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "init_std": 0.2,
        },
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    ),
    "peft-internal-testing/tiny-random-BertModel": _model("BertModel", "BertConfig", **_BERT),
    "peft-internal-testing/tiny-random-RobertaModel": _model("RobertaModel", "RobertaConfig", **_BERT),
    "peft-internal-testing/tiny-random-DebertaModel": _model(
        "DebertaModel", "DebertaConfig", **_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": _model(
        "DebertaV2Model", "DebertaV2Config", **_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"]
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": _model(
        "BertForSequenceClassification", "BertConfig", **_BERT
    ),
    "bert-base-uncased": _model("BertForSequenceClassification", "BertConfig", **_BERT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": _model(
        "RobertaForSequenceClassification", "RobertaConfig", **_BERT
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": _model(
        "LlamaForSequenceClassification", "LlamaConfig", **_GROUPED, num_labels=1
    ),
}
_T5 = _model(
    "T5ForConditionalGeneration",
    "T5Config",
    vocab_size=VOCABULARY,
    d_model=16,
    d_kv=4,
    d_ff=32,
    num_layers=2,
    num_heads=4,
    pad_token_id=0,
    decoder_start_token_id=0,
    eos_token_id=2,
)
for _name in ("T5ForConditionalGeneration-calibrated", "T5ForConditionalGeneration", "t5"):
    MODELS[f"peft-internal-testing/tiny-random-{_name}"] = _T5


def create(folder: Path) -> None:
    """Write every model under `folder`, where its Hub name is the relative path."""
    transformers.utils.logging.disable_progress_bar()
    for name, build in MODELS.items():
        torch.manual_seed(0)
        build().save_pretrained(folder / name)

"""Where a parameter lies, read off the names that real architectures use."""

from __future__ import annotations

import pytest

from peft_sparse.selection.anatomy import Place, by_group, depths, place_of

CASES = {
    # BERT, RoBERTa, XLM-R
    "bert.embeddings.word_embeddings.weight": Place("", None, "embeddings"),
    "roberta.embeddings.LayerNorm.bias": Place("", None, "embeddings"),
    "bert.encoder.layer.10.attention.self.query.weight": Place("bert.encoder.layer", 10, "attention"),
    "encoder.layer.0.attention.output.dense.bias": Place("encoder.layer", 0, "attention"),
    "encoder.layer.0.attention.output.LayerNorm.weight": Place("encoder.layer", 0, "norm"),
    "encoder.layer.0.intermediate.dense.weight": Place("encoder.layer", 0, "feed-forward"),
    "encoder.layer.0.output.dense.weight": Place("encoder.layer", 0, "feed-forward"),
    "encoder.layer.0.output.LayerNorm.weight": Place("encoder.layer", 0, "norm"),
    "bert.pooler.dense.weight": Place("", None, "other"),
    # DistilBERT
    "distilbert.transformer.layer.5.attention.q_lin.weight": Place("distilbert.transformer.layer", 5, "attention"),
    "distilbert.transformer.layer.5.ffn.lin1.weight": Place("distilbert.transformer.layer", 5, "feed-forward"),
    "distilbert.transformer.layer.5.sa_layer_norm.weight": Place("distilbert.transformer.layer", 5, "norm"),
    # Llama, Qwen, Gemma, Mixtral
    "model.embed_tokens.weight": Place("", None, "embeddings"),
    "model.layers.31.self_attn.q_proj.weight": Place("model.layers", 31, "attention"),
    "model.layers.31.mlp.gate_proj.weight": Place("model.layers", 31, "feed-forward"),
    "model.layers.31.post_attention_layernorm.weight": Place("model.layers", 31, "norm"),
    "model.layers.3.self_attn.q_norm.weight": Place("model.layers", 3, "norm"),
    "model.layers.3.block_sparse_moe.experts.7.w1.weight": Place("model.layers", 3, "feed-forward"),
    "model.norm.weight": Place("", None, "norm"),
    "lm_head.weight": Place("", None, "other"),
    # GPT-2
    "transformer.wte.weight": Place("", None, "embeddings"),
    "transformer.wpe.weight": Place("", None, "embeddings"),
    "transformer.h.2.attn.c_attn.weight": Place("transformer.h", 2, "attention"),
    "transformer.h.2.mlp.c_proj.weight": Place("transformer.h", 2, "feed-forward"),
    "transformer.h.2.ln_1.weight": Place("transformer.h", 2, "norm"),
    "transformer.ln_f.weight": Place("", None, "norm"),
    # T5, BART, OPT
    "shared.weight": Place("", None, "embeddings"),
    "encoder.block.1.layer.0.SelfAttention.q.weight": Place("encoder.block", 1, "attention"),
    "decoder.block.1.layer.2.DenseReluDense.wi_0.weight": Place("decoder.block", 1, "feed-forward"),
    "decoder.block.0.layer.1.EncDecAttention.o.weight": Place("decoder.block", 0, "attention"),
    "decoder.block.1.layer.1.layer_norm.weight": Place("decoder.block", 1, "norm"),
    "model.decoder.layers.4.fc1.weight": Place("model.decoder.layers", 4, "feed-forward"),
    "model.decoder.embed_positions.weight": Place("", None, "embeddings"),
    # ModernBERT, ALBERT (one group of layers, used again and again)
    "layers.3.attn.Wqkv.weight": Place("layers", 3, "attention"),
    "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": Place(
        "albert.encoder.albert_layer_groups", 0, "feed-forward"
    ),
    "albert.encoder.albert_layer_groups.0.albert_layers.0.full_layer_layer_norm.weight": Place(
        "albert.encoder.albert_layer_groups", 0, "norm"
    ),
    # RecurrentGemma, Granite MoE, XLNet, XLM
    "model.layers.2.temporal_block.q_proj.weight": Place("model.layers", 2, "attention"),
    "model.layers.2.temporal_block.linear_x.weight": Place("model.layers", 2, "other"),
    "model.layers.1.block_sparse_moe.router.layer.weight": Place("model.layers", 1, "feed-forward"),
    "transformer.layer.0.ff.layer_1.weight": Place("transformer.layer", 0, "feed-forward"),
    "transformer.attentions.3.q_lin.weight": Place("transformer.attentions", 3, "attention"),
    "transformer.ffns.3.lin1.weight": Place("transformer.ffns", 3, "feed-forward"),
    "transformer.layer_norm1.3.weight": Place("transformer.layer_norm1", 3, "norm"),
    # names without a path
    "weight": Place("", None, "other"),
    "lin0.weight": Place("", None, "other"),
    "0.weight": Place("", 0, "other"),
}


@pytest.mark.parametrize(("name", "place"), CASES.items())
def test_place_of(name, place):
    assert place_of(name) == place


def test_group_names_the_layer_with_its_stack():
    assert place_of("decoder.block.1.layer.1.layer_norm.weight").group == "decoder.block.1"
    assert place_of("bert.embeddings.LayerNorm.weight").group == "embeddings"
    assert place_of("model.norm.weight").group == "other"


def test_long_names_take_no_longer_than_they_are():
    # By a regular expression that goes back over each part, this would take longer than anybody waits.
    long = ".".join(["a_module_of_a_long_name"] * 40)
    assert place_of(f"{long}.weight") == Place("", None, "other")
    assert place_of(f"{long}.12.mlp.3.weight") == Place(long, 12, "feed-forward")
    assert place_of(f"{long}.12") == Place("", None, "other")


def test_depths_of_each_stack():
    names = ["shared.weight", "encoder.block.1.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.0.x.weight"]
    assert depths([*names, "decoder.block.4.layer.0.x.weight"]) == {"encoder.block": 2, "decoder.block": 5}
    assert depths(["shared.weight"]) == {}


def test_groups_come_in_the_order_of_the_model():
    names = ["decoder.block.0.a.weight", "encoder.block.10.a.weight", "encoder.block.2.b.weight", "lm_head.weight"]
    found = by_group([*names, "shared.weight", "encoder.block.2.a.weight", "decoder.final_layer_norm.weight"])
    assert list(found.items()) == [
        ("embeddings", ["shared.weight"]),
        ("encoder.block.2", ["encoder.block.2.b.weight", "encoder.block.2.a.weight"]),
        ("encoder.block.10", ["encoder.block.10.a.weight"]),
        ("decoder.block.0", ["decoder.block.0.a.weight"]),
        ("other", ["lm_head.weight", "decoder.final_layer_norm.weight"]),
    ]

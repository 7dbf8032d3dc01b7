"""Tied embeddings: the delta acts on the input side alone; merging unties, and the result saves and reloads."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_sparse import RandConfig, iter_deltas, resident

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))


def bert():
    return BertForMaskedLM(BertConfig(**SMALL, max_position_embeddings=12, tie_word_embeddings=True))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=12))


def bart():
    config = BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=30, max_position_embeddings=12,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def t5():
    return T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=30, decoder_start_token_id=0)
    )


# model, name of the tuned embedding
MODELS = {
    "llama": (llama, "model.embed_tokens.weight"),
    "bert": (bert, "bert.embeddings.word_embeddings.weight"),
    "gpt2": (gpt2, "transformer.wte.weight"),
    "bart": (bart, "model.shared.weight"),
    "t5": (t5, "shared.weight"),
}


def logits(model, ids=None):
    ids = torch.arange(10)[None] % 29 + 1 if ids is None else ids
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    with torch.no_grad():
        return model(input_ids=ids, **({"decoder_input_ids": ids} if encoder_decoder else {})).logits


def tuned(kind, **fields):
    torch.manual_seed(0)
    base = MODELS[kind][0]().eval()
    config = RandConfig(**{"density": 0.3, "init_weights": False, "target_modules": "all", **fields})
    return base, get_peft_model(copy.deepcopy(base), config).eval()


def oracle(base, model, kind):
    """The base model with a dense input embedding of its own in every place that looks up in the tied matrix."""
    twin = copy.deepcopy(base)
    deltas = {name: delta.delta.to_dense() for name, _, _, delta in iter_deltas(model)}
    tied = MODELS[kind][1]
    matrix = twin.get_parameter(tied)
    for module in twin.modules():
        if isinstance(module, nn.Embedding) and module.weight is matrix:
            module.weight = nn.Parameter(matrix.detach() + deltas[tied])
    for name, delta in deltas.items():
        if name != tied:
            twin.get_parameter(name).data += delta
    return twin


@pytest.mark.parametrize("kind", MODELS)
def test_the_delta_acts_on_every_lookup_and_leaves_the_output_matrix_alone(kind):
    base, model = tuned(kind)
    assert MODELS[kind][1] in {name for name, _, _, _ in iter_deltas(model)}
    expected = logits(oracle(base, model, kind))
    assert not torch.allclose(expected, logits(base))
    torch.testing.assert_close(logits(model), expected)
    assert model.get_nb_trainable_parameters()[0] == sum(model.peft_config["default"].counts.values())


@pytest.mark.parametrize("kind", MODELS)
def test_merge_and_unmerge_are_bit_exact_and_keep_the_tie(kind):
    base, model = tuned(kind)
    expected = logits(model)
    before = {name: p.detach().clone() for name, p in base.named_parameters(remove_duplicate=False)}
    for _ in range(3):
        model.merge_adapter()
        assert torch.equal(logits(model), expected)
        model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    with resident(model):
        assert torch.equal(logits(model), expected)
    restored = model.unload()
    after = dict(restored.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    output = restored.get_output_embeddings().weight
    assert output is restored.get_parameter(MODELS[kind][1])


@pytest.mark.parametrize("kind", MODELS)
def test_a_merged_model_survives_save_pretrained(kind, tmp_path):
    _, model = tuned(kind)
    expected = logits(model)
    with pytest.warns(UserWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(merged), expected)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(merged).from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_on_tied_embeddings_saves_and_reloads_without_the_matrix(kind, tmp_path):
    base, model = tuned(kind)
    model.save_pretrained(tmp_path)
    dense = sum(p.numel() * 4 for p in base.parameters())
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 0.3 * 5.3 * dense / 4 + 50_000
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(reloaded), logits(model))


@pytest.mark.parametrize("target", [["embed_tokens"], r".*embed_tokens", ["embed_tokens", "q_proj"]])
def test_naming_the_embedding_does_not_save_the_base_matrix(target, tmp_path):
    base, model = tuned("llama", target_modules=target)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(reloaded), logits(model))
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "base_layer" in key]  # noqa: SIM118


def test_tuning_the_output_matrix_leaves_the_input_embedding_alone(tmp_path):
    base, model = tuned("llama", target_modules=["lm_head"])
    twin = copy.deepcopy(base)
    delta = next(delta for _, _, _, delta in iter_deltas(model)).delta.to_dense()
    twin.lm_head.weight = nn.Parameter(twin.lm_head.weight.detach() + delta)
    torch.testing.assert_close(logits(model), logits(twin))
    expected = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), expected)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path)), expected)


def test_gradients_reach_a_shared_delta_from_encoder_and_decoder():
    base, model = tuned("bart", target_modules=["shared"])
    ids = torch.arange(10)[None] % 29 + 1
    model(input_ids=ids, decoder_input_ids=ids, labels=ids).loss.backward()
    twin = copy.deepcopy(base)
    (_, _, _, delta), *others = iter_deltas(model)
    assert not others
    matrix = twin.model.shared.weight
    leaf = delta.delta.to_dense().requires_grad_()
    for module in twin.modules():
        if isinstance(module, nn.Embedding) and module.weight is matrix:
            del module._parameters["weight"]
            module.weight = matrix.detach() + leaf
    twin(input_ids=ids, decoder_input_ids=ids, labels=ids).loss.backward()
    torch.testing.assert_close(delta.values.grad, leaf.grad.view(-1)[delta.indices.long()], rtol=1e-4, atol=1e-6)

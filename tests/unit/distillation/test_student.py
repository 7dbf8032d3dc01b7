"""Students: which layers they have, and that everything else is the teacher's."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartModel,
    DistilBertConfig,
    DistilBertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from peft_sparse import ConfigError
from peft_sparse.distillation import make_student
from tests.support.tokenizers import make_bert, make_llama

IDS = torch.tensor([[1, 5, 7, 9, 2]])


@pytest.mark.parametrize(("depth", "stride", "expected"), [(12, 2, [1, 3, 5, 7, 9, 11]), (12, 3, [2, 5, 8, 11])])
def test_every_stride_th_layer_with_the_last_one(depth, stride, expected):
    model = make_bert(40, num_hidden_layers=depth)
    student = make_student(model, stride=stride)
    assert student.config.teacher_layers == expected
    assert student.config.num_hidden_layers == len(student.bert.encoder.layer) == len(expected)
    for new, old in enumerate(expected):
        copied, whole = student.bert.encoder.layer[new].state_dict(), model.bert.encoder.layer[old].state_dict()
        assert all(torch.equal(copied[name], whole[name]) for name in whole)
    rest = {name for name in model.state_dict() if "encoder.layer" not in name}
    assert all(torch.equal(student.state_dict()[name], model.state_dict()[name]) for name in rest)


def test_a_student_of_all_layers_is_the_teacher():
    for model in (make_bert(40), make_llama(40)):
        student = make_student(model, stride=1, dropout=None).eval()
        with torch.no_grad():
            assert torch.equal(student(IDS).logits, model(IDS).logits)


def test_it_shares_nothing_trains_everything_and_has_no_dropout():
    model = make_bert(40).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student = make_student(model, layers=[0, 3])
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert student.cls.predictions.decoder.weight is student.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        first, second = student(IDS).logits, student(IDS).logits
        assert torch.equal(first, second)  # in training mode: no dropout is left anywhere
        for parameter in student.parameters():
            parameter.fill_(1)
    assert student.config.hidden_dropout_prob == student.config.attention_probs_dropout_prob == 0
    assert model.config.num_hidden_layers == 4
    assert model.config.hidden_dropout_prob == 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_cache_of_a_decoder_counts_the_new_layers():
    model = make_llama(40, pad_token_id=0, eos_token_id=None)
    student = make_student(model, stride=2).eval()
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]
    ids = IDS
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, student(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(student.generate(IDS, max_new_tokens=4, do_sample=False), ids)


def test_layers_keep_their_kind(tmp_path):
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 3
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma3TextConfig(
        vocab_size=40, num_hidden_layers=6, layer_types=kinds, sliding_window=3, intermediate_size=32, **sizes
    )
    student = make_student(Gemma3ForCausalLM(config), stride=3).eval()
    assert student.config.layer_types == ["sliding_attention", "full_attention"]
    assert [layer.self_attn.is_sliding for layer in student.model.layers] == [True, False]
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.layer_types == student.config.layer_types
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, student(IDS).logits)


def test_it_reloads_with_its_layers(tmp_path):
    student = make_student(make_bert(40), stride=2).eval()
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path).eval()
    assert AutoConfig.from_pretrained(tmp_path).teacher_layers == [1, 3]
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, student(IDS).logits)


@pytest.mark.parametrize(
    "model",
    [
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=4, n_head=2, n_positions=32)),
        lambda: DistilBertModel(DistilBertConfig(vocab_size=40, dim=16, n_layers=4, n_heads=2, hidden_dim=32)),
    ],
)
def test_configs_with_names_of_their_own(model, tmp_path):
    whole = model()
    student = make_student(whole, stride=2).eval()
    assert student.config.num_hidden_layers == 2
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS)[0], student(IDS)[0])


def test_scratch_has_the_shape_and_nothing_else():
    model = make_bert(40)
    student = make_student(model, stride=2, start="random")
    copied = make_student(model, stride=2)
    assert {name: t.shape for name, t in student.state_dict().items()} == {
        name: t.shape for name, t in copied.state_dict().items()
    }
    table = student.bert.embeddings.word_embeddings.weight
    assert not torch.equal(table, model.bert.embeddings.word_embeddings.weight)
    assert student.config.teacher_layers == [1, 3]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({}, "give either stride=2"),
        ({"stride": 2, "layers": [1]}, "give either stride=2"),
        ({"stride": 3}, r"stride must divide the 4 layers, so be one of \[1, 2, 4\], got 3"),
        ({"stride": True}, "stride must divide"),
        ({"layers": [3, 1]}, r"layers must be ascending indices of the 4 layers, 0 to 3, got \[3, 1\]"),
        ({"layers": [2, 4]}, r"0 to 3, got \[2, 4\]"),
        ({"layers": []}, "layers must be ascending"),
        ({"stride": 2, "start": "teacher"}, "start must be 'copied' or 'random', got 'teacher'"),
        ({"stride": 2, "dropout": 1}, r"dropout must be in \[0, 1\) or None, got 1"),
    ],
)
def test_bad_settings_are_refused_by_name(changes, match):
    with pytest.raises(ConfigError, match=match):
        make_student(make_bert(40), **changes)


def test_models_that_cannot_lose_layers_are_refused_by_name():
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    albert = AlbertModel(AlbertConfig(embedding_size=8, num_hidden_layers=4, **sizes))
    with pytest.raises(ConfigError, match="must have its 4 layers in one list"):
        make_student(albert, stride=2)
    small = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    with pytest.raises(ConfigError, match="has an encoder and a decoder"):
        make_student(
            BartModel(BartConfig(vocab_size=40, d_model=16, encoder_ffn_dim=8, decoder_ffn_dim=8, **small)), stride=2
        )
    with pytest.raises(ConfigError, match="without adapters"):
        make_student(get_peft_model(make_bert(40), LoraConfig(target_modules=["query"])), stride=2)
    gpt2 = GPT2Config(vocab_size=40, n_embd=16, n_layer=4, n_head=2, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ConfigError, match="or their own number"):
        make_student(GPT2LMHeadModel(gpt2), stride=2)

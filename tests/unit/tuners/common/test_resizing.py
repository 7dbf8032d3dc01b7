"""Resizing the vocabulary of a model that has adapters."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from peft_sparse import ConfigError
from tests.support.adapters import TYPES, adapted
from tests.support.models import IDS, llama, logits

pytestmark = pytest.mark.filterwarnings("ignore")
TUNED = [
    *(("SPARSE_FT", {"target_modules": target}) for target in (["embed_tokens"], ["lm_head"], "all")),
    ("ADA_SFT", {"target_modules": ["lm_head", "q_proj"]}),
    *((kind, {"modules_to_save": ["lm_head"]}) for kind in ("BOTTLENECK", "MAD_G")),
    ("SPARSE_FT", {"target_modules": ["q_proj"], "trainable_token_indices": [3]}),
]


@pytest.mark.parametrize(("kind", "fields"), TUNED)
def test_a_tuned_vocabulary_is_not_resized(kind, fields):
    model = adapted(kind, llama(), **fields)
    expected = logits(model)
    with pytest.raises(ConfigError, match=r"(embed_tokens|lm_head) is tuned or .* is added.*unload\(\)"):
        model.resize_token_embeddings(25)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", TYPES)
def test_another_is(kind):
    fields = {"target_modules": ["q_proj"]} if kind in ("SPARSE_FT", "ADA_SFT") else {}
    model = adapted(kind, llama(), **fields)
    expected = logits(model)
    model.resize_token_embeddings(25)
    found = model(input_ids=IDS + 4).logits
    assert found.shape[-1] == 25
    assert torch.equal(logits(model)[..., :20], expected)


def test_the_way_out_keeps_what_was_trained(tmp_path):
    model = adapted("SPARSE_FT", llama(), target_modules=["embed_tokens", "q_proj"])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    base = model.unload()
    base.resize_token_embeddings(25)
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(again)[..., :20], expected)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_the_same_size_leaves_the_base_frozen(target):
    model = adapted("SPARSE_FT", llama(), target_modules=[target, "q_proj"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.get_base_model().resize_token_embeddings(20)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained


def test_a_layer_is_frozen_and_opened_as_any_module():
    layer = adapted("SPARSE_FT", llama(), target_modules=["embed_tokens"]).get_input_embeddings()
    layer.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    layer.requires_grad_(True)
    assert layer.get_base_layer().weight.requires_grad

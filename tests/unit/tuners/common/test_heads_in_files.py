"""Adapters with and without heads, loaded into models with and without them."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertForSequenceClassification

from peft_sparse import ConfigError, FormatError
from tests.support.adapters import TYPES, adapted
from tests.support.models import bert, llama, logits
from tests.support.training import assert_same_tensors, state_of

pytestmark = pytest.mark.filterwarnings("ignore")
# The classifier must not be a target of the adapters that have no head.
FIELDS = {kind: {"target_modules": ["query", "value"]} if kind in ("SPARSE_FT", "ADA_SFT") else {} for kind in TYPES}


def classifier() -> nn.Module:
    return bert(BertForSequenceClassification, num_labels=3)


@pytest.mark.parametrize("kind", TYPES)
def test_an_adapter_without_a_head_acts_with_the_base_models_own(kind, tmp_path):
    headless = adapted(kind, classifier().eval(), **FIELDS[kind])
    expected = logits(headless)
    headless.save_pretrained(tmp_path / "headless")
    model = adapted(kind, classifier().eval(), task_type="SEQ_CLS", **FIELDS[kind])
    with_head = logits(model)

    model.load_adapter(tmp_path / "headless", "b")

    model.set_adapter("b")
    assert torch.equal(logits(model), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model), with_head)
    assert not torch.equal(with_head, expected)
    model.save_pretrained(tmp_path / "both", selected_adapters=["b"])
    again = PeftModel.from_pretrained(classifier().eval(), tmp_path / "both" / "b")
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_that_lacks_its_head_is_refused_before_the_model_is_touched(kind, tmp_path):
    adapted(kind, classifier(), **FIELDS[kind]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": "SEQ_CLS"}))
    base = classifier()
    before = state_of(base)
    with pytest.raises(FormatError, match=r"has no 'classifier\.(weight|bias)'.*set both fields to null"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_same_tensors(state_of(base), before)


@pytest.mark.parametrize("kind", TYPES)
def test_a_head_in_a_compiled_model_is_refused_with_the_way_out(kind, tmp_path):
    adapted(kind, classifier(), task_type="SEQ_CLS", **FIELDS[kind]).save_pretrained(tmp_path)
    base = classifier()
    before = state_of(base)
    with pytest.raises(ConfigError, match=r"compiled model.*before torch.compile.*model\.compile\(\)"):
        PeftModel.from_pretrained(torch.compile(base, backend="eager"), tmp_path)
    assert_same_tensors(state_of(base), before)
    model = PeftModel.from_pretrained(base, tmp_path)
    assert "default" in model.base_model.model.classifier.modules_to_save


@pytest.mark.parametrize("kind", ["SPARSE_FT", "ADA_SFT"])
def test_a_head_that_another_adapter_tunes_is_refused(kind, tmp_path):
    adapted(kind, classifier(), task_type="SEQ_CLS", **FIELDS[kind]).save_pretrained(tmp_path)
    model = adapted(kind, classifier())
    before = state_of(model)
    with pytest.raises(ConfigError, match=r"names classifier, .*exclude_modules=\['classifier'\]"):
        model.load_adapter(tmp_path, "b")
    assert list(model.peft_config) == ["default"]
    assert_same_tensors(state_of(model), before)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("head", ["lm_head", "embed_tokens"])
def test_a_head_of_another_vocabulary_is_refused_and_the_model_left_alone(kind, head, tmp_path):
    fields = {"target_modules": ["q_proj"]} if kind in ("SPARSE_FT", "ADA_SFT") else {}
    adapted(kind, llama(), modules_to_save=[head], **fields).save_pretrained(tmp_path)
    error = rf"{head}.weight' has shape \(20, 16\) in the file and \(25, 16\).*resize_token_embeddings"
    base = llama(vocab_size=25)
    before = state_of(base)
    with pytest.raises(FormatError, match=error):
        PeftModel.from_pretrained(base, tmp_path)
    assert_same_tensors(state_of(base), before)
    assert all(parameter.requires_grad for parameter in base.parameters())

    model = adapted(kind, base, **fields)
    expected = logits(model)
    with pytest.raises(FormatError, match=error):
        model.load_adapter(tmp_path, "b")
    assert list(model.peft_config) == ["default"]
    assert not [name for name in model.state_dict() if ".b." in name]
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["ADA_SFT", "BOTTLENECK", "MAD_G"])
def test_pefts_way_to_leave_such_a_head_out_still_works(kind, tmp_path):
    fields = {"target_modules": ["q_proj"]} if kind == "ADA_SFT" else {}
    adapted(kind, llama(), modules_to_save=["lm_head"], **fields).save_pretrained(tmp_path)
    base = llama(vocab_size=25)
    own = base.lm_head.weight.clone()
    model = PeftModel.from_pretrained(base, tmp_path, ignore_mismatched_sizes=True)
    assert torch.equal(model.base_model.model.lm_head.weight, own)


@pytest.mark.parametrize("kind", TYPES)
def test_a_head_that_is_loaded_again_is_checked_too(kind, tmp_path):
    model = adapted(kind, classifier(), task_type="SEQ_CLS", **FIELDS[kind])
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.classifier.weight"
    save_file({**tensors, key: tensors[key][:2].contiguous()}, path)
    before = state_of(model)
    with pytest.raises(FormatError, match=r"classifier\.weight"):
        model.load_adapter(tmp_path, "default")
    assert_same_tensors(state_of(model), before)


@pytest.mark.parametrize("kind", TYPES)
def test_heads_in_a_model_of_transformers_go_and_come_back(kind, tmp_path):
    base = logits(classifier())
    tuned = adapted(kind, classifier(), "a", "b", task_type="SEQ_CLS", **FIELDS[kind])
    tuned.save_pretrained(tmp_path)
    model = classifier()
    for name in ("a", "b"):
        model.load_adapter(str(tmp_path / name), adapter_name=name)
    for name in ("a", "b"):
        tuned.set_adapter(name)
        model.set_adapter(name)
        expected = logits(tuned)
        assert torch.equal(logits(model), expected)
        model.disable_adapters()
        assert torch.equal(logits(model), base)
        model.enable_adapters()
        assert torch.equal(logits(model), expected)
    assert not torch.equal(expected, base)

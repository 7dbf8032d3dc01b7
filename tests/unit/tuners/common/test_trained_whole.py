"""Modules that are trained whole, or in some rows, beside those that an adapter tunes: never both, never nothing."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from peft_sparse import AdaSftConfig, BottleneckConfig, ConfigError, RandConfig, extract_adapter, iter_deltas
from tests.support.adapters import TYPES, adapted, config
from tests.support.models import llama, logits, picture

pytestmark = pytest.mark.filterwarnings("ignore")


def distilbert():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 16}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes)).eval()


@pytest.mark.parametrize("kind", TYPES)
def test_heads_whose_names_end_alike_are_trained_whole_and_not_tuned(kind, tmp_path):
    """PEFT finds "classifier" in DistilBERT's "pre_classifier", too."""
    model = adapted(kind, distilbert(), task_type="SEQ_CLS")
    whole = {name.split(".")[2] for name, _ in model.named_parameters() if "modules_to_save" in name}
    assert whole == {"pre_classifier", "classifier"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(distilbert(), tmp_path).eval()
    if kind == "MAD_G":
        loaded.set_language("quy")
    assert torch.equal(logits(loaded), logits(model))


def test_norms_that_are_trained_whole_are_left_to_peft():
    model = get_peft_model(llama(), RandConfig(density=0.1, target_modules="all", modules_to_save=["norm"]))
    tuned = {name for name, *_ in iter_deltas(model)}
    assert tuned == {name for name, _ in llama().named_parameters() if "norm" not in name and "lm_head" not in name}


@pytest.mark.parametrize("kind", TYPES)
def test_a_head_that_the_model_does_not_have_is_refused(kind, caplog):
    base = llama()
    before = picture(base)
    match = (
        r"modules_to_save of adapter 'default': no module of the model is called \['lm_hed'\]\. Did you mean 'lm_head'"
    )
    with pytest.raises(ConfigError, match=match):
        get_peft_model(base, config(kind, modules_to_save=["lm_hed"]))
    assert picture(base) == before
    with caplog.at_level(logging.WARNING):
        model = get_peft_model(base, config(kind, modules_to_save=["lm_hed", "lm_head"]))
    assert "no module of the model is called ['lm_hed']. Did you mean 'lm_head'?" in caplog.text
    assert any("lm_head.modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)


ROWS = {
    "tuned": RandConfig(density=0.1, target_modules=["embed_tokens"], trainable_token_indices=[1]),
    "tuned, by name": RandConfig(density=0.1, target_modules="all", trainable_token_indices={"embed_tokens": [1]}),
    "the tied output, tuned": AdaSftConfig(target_modules=["lm_head"], trainable_token_indices=[1]),
    "invertible": BottleneckConfig(bottleneck_size=4, invertible="nice", trainable_token_indices=[1]),
    "whole": RandConfig(
        density=0.1, target_modules=["q_proj"], modules_to_save=["embed_tokens"], trainable_token_indices=[1]
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_of_a_matrix_that_is_tuned_or_trained_whole_are_refused(case):
    base = llama(tie_word_embeddings="tied" in case)
    before = picture(base)
    with pytest.raises(ConfigError, match=r"trainable_token_indices trains rows of \S+, which (an adapter|modules_)"):
        get_peft_model(base, ROWS[case])
    assert picture(base) == before
    if isinstance(ROWS[case], RandConfig):
        model = get_peft_model(base, RandConfig(density=0.1, target_modules=["v_proj"]))
        before = picture(model)
        with pytest.raises(ConfigError, match="trainable_token_indices trains rows of"):
            model.add_adapter("rows", ROWS[case])
        assert picture(model) == before


def test_an_invertible_adapter_around_a_module_that_is_trained_whole_is_refused():
    config = BottleneckConfig(bottleneck_size=4, invertible="nice", modules_to_save=["embed_tokens"])
    with pytest.raises(
        ConfigError, match=r"is model\.embed_tokens, which exclude_modules or modules_to_save names too"
    ):
        get_peft_model(llama(), config)


@pytest.mark.parametrize("kind", TYPES)
def test_a_name_that_leaves_nothing_out_is_told(kind, caplog):
    wrong = ["mpl"] if kind in ("BOTTLENECK", "MAD_G") else ["q_proj", "mpl"]
    with caplog.at_level(logging.WARNING):
        get_peft_model(llama(), config(kind, exclude_modules=wrong))
    assert "no module of the model is called 'mpl', and none is left out for it. Did you mean 'mlp'?" in caplog.text
    assert "'q_proj'" not in caplog.text


def test_a_name_that_leaves_nothing_out_of_an_extraction_is_told(tmp_path, caplog):
    llama().save_pretrained(tmp_path / "base")
    llama(seed=1).save_pretrained(tmp_path / "tuned")
    with caplog.at_level(logging.WARNING):
        extract_adapter(
            tmp_path / "base", tmp_path / "tuned", tmp_path / "out", num_weights=5, exclude_modules=["lm_haed"]
        )
    assert "exclude_modules: no module of the model is called 'lm_haed'" in caplog.text
    assert "Did you mean 'lm_head'?" in caplog.text

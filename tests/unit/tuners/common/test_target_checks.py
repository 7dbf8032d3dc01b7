"""Requests for targets that cannot be had, and adapters on models of another depth, vocabulary or range."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import NoMatchingPeftModuleError
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from peft_sparse import (
    AdaSftConfig,
    BottleneckConfig,
    ConfigError,
    FormatError,
    MadGConfig,
    RandConfig,
    SpielAGConfig,
    iter_deltas,
)
from peft_sparse.core.names import unwrapped
from peft_sparse.tuners.common.target_checks import NotInThisStateError, refuse_unsupported, shortest_exclusion
from tests.support import models

IDS = torch.arange(2, 12)[None]


def llama(*, layers: int = 2, vocabulary: int = 64) -> nn.Module:
    return models.llama(vocab_size=vocabulary, num_hidden_layers=layers, num_key_value_heads=2)


@pytest.mark.parametrize("make", [lambda names: RandConfig(density=0.1, target_modules=names), AdaSftConfig])
@pytest.mark.parametrize(
    ("names", "meant"), [(["q_porj"], "q_proj"), (["all_linear"], "all-linear"), (["mlp.dwn_proj"], "mlp.down_proj")]
)
def test_a_name_that_nothing_has_gets_the_nearest(make, names, meant):
    config = make(names) if make is not AdaSftConfig else AdaSftConfig(target_modules=names)
    with pytest.raises(ConfigError, match=rf"not found in the base model.*Did you mean '{meant}'"):
        get_peft_model(llama(), config)


def test_a_keyword_misspelt_as_a_regex_gets_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'all-linear'"):
        get_peft_model(llama(), RandConfig(density=0.1, target_modules="all_linear"))


def test_one_of_several_names_that_nothing_has_is_told(caplog):
    with caplog.at_level(logging.WARNING):
        model = get_peft_model(llama(), RandConfig(density=0.1, target_modules=["q_porj", "v_proj"]))
    assert "no module of the model is called 'q_porj'. 'q_porj': Did you mean 'q_proj'?" in caplog.text
    assert {name.split(".")[-2] for name, *_ in iter_deltas(model)} == {"v_proj"}


@pytest.mark.parametrize("config", [lambda: RandConfig(density=0.1, target_modules="all-linear"), AdaSftConfig])
def test_all_linear_leaves_the_output_layer_out_of_a_compiled_model_too(config):
    plain = get_peft_model(llama(), config())
    compiled = get_peft_model(torch.compile(llama(), backend="eager"), config())
    found = {unwrapped(name) for name in compiled.targeted_module_names}
    assert found == set(plain.targeted_module_names)
    assert not any("lm_head" in name for name in found)


def test_all_linear_leaves_out_what_is_never_called(caplog):
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    with caplog.at_level(logging.WARNING):
        model = get_peft_model(SiglipVisionModel(config), RandConfig(density=0.1, target_modules="all-linear"))
    assert "leaves out head.attention.out_proj" in caplog.text
    assert not any("out_proj" in name and "head" in name for name, *_ in iter_deltas(model))


def test_all_that_cannot_be_tuned_is_refused_at_once():
    refused = {
        "a.0.gate": ConfigError("gate is odd. Leave it out."),
        "a.1.gate": ConfigError("gate is odd. Leave it out."),
    }
    with pytest.raises(ConfigError, match=r"2 of the targeted modules.*exclude_modules=\['gate'\]") as error:
        refuse_unsupported(refused, ["a.0.up"])
    assert "a.0.gate: gate is odd" in str(error.value)
    assert "a.1.gate: gate is odd" in str(error.value)


def test_what_was_done_to_the_whole_model_is_not_answered_with_modules_to_leave_out():
    sharded = NotInThisStateError("a.1.up is sharded already. Add the adapter to the whole model.")
    with pytest.raises(ConfigError) as error:
        refuse_unsupported({"a.0.gate": ConfigError("a.0.gate is odd. Leave it out."), "a.1.up": sharded}, ["b"])
    assert error.value is sharded


def test_the_shortest_exclusion_names_nothing_else():
    assert shortest_exclusion(["a.0.out", "b.0.out"], ["a.0.up"]) == ["out"]
    assert shortest_exclusion(["head.out", "tail.x"], ["body.out"]) == ["head.out", "x"]
    assert shortest_exclusion(["out"], ["body.out"]) == ["out"]


def test_an_adapter_of_a_shallower_model_is_told(tmp_path, caplog):
    config = RandConfig(density=0.1, target_modules="all-linear", init_weights=False)
    get_peft_model(llama(layers=3), config).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        PeftModel.from_pretrained(llama(layers=3), tmp_path)
    assert "smaller model" not in caplog.text
    with caplog.at_level(logging.WARNING):
        PeftModel.from_pretrained(llama(layers=4), tmp_path)
    assert "tunes the first 3 layers of model.layers, which has 4 here" in caplog.text


def test_an_adapter_serves_a_model_with_new_rows(tmp_path, caplog):
    config = RandConfig(density=0.1, target_modules=["embed_tokens", "q_proj"], init_weights=False)
    tuned = get_peft_model(llama(), config).eval()
    tuned.save_pretrained(tmp_path)
    base = llama()
    base.resize_token_embeddings(80)
    with caplog.at_level(logging.WARNING):
        model = PeftModel.from_pretrained(base, tmp_path).eval()
    assert "model.embed_tokens.weight has 80 rows here and had 64" in caplog.text
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits[..., :64], tuned(input_ids=IDS).logits)


def test_an_adapter_for_more_rows_says_what_would_be_lost(tmp_path):
    config = RandConfig(density=0.5, target_modules=["embed_tokens"], init_weights=False)
    get_peft_model(llama(vocabulary=80), config).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"of its 640 tuned weights.*resize_token_embeddings\(80\)"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_values_beyond_the_range_of_the_weight_are_told(tmp_path, caplog):
    model = get_peft_model(llama().half(), RandConfig(density=0.1, target_modules=["q_proj"]))
    for _, _, _, delta in iter_deltas(model):
        delta.values.data.fill_(70_000.0)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path)
    assert "model.layers.0.self_attn.q_proj.weight (7e+04 in float16)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        PeftModel.from_pretrained(llama().half(), tmp_path)
    assert "beyond the range" in caplog.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("initial_reselection_rate", 7),
        ("initial_reselection_rate", 0),
        ("reselection_until", 2),
        ("total_steps", 0),
        ("total_steps", 100.5),
        ("reselection_schedule", "liner"),
        ("estimation_steps", 0),
    ],
)
def test_a_calendar_that_cannot_be_kept_is_refused_when_it_is_written(field, value):
    with pytest.raises(ConfigError, match=field):
        SpielAGConfig(density=0.1, **{field: value})


def test_all_leaves_out_what_attention_never_calls_and_the_advice_for_the_rest_holds(caplog):
    config = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2
    )
    with pytest.raises(ConfigError, match=r"2 of the .* exclude_modules=\['attention', 'head'\]"):
        get_peft_model(SiglipVisionModel(config), RandConfig(density=0.1, target_modules="all"))
    assert "all leaves out head.attention.out_proj" in caplog.text
    caplog.clear()
    request = RandConfig(density=0.1, target_modules="all", exclude_modules=["attention", "head"])
    counts = get_peft_model(SiglipVisionModel(config), request).peft_config["default"].counts
    assert "head.attention.out_proj.weight" not in counts
    assert counts["head.mlp.fc1.weight"] > 0
    caplog.clear()
    silent = RandConfig(density=0.1, target_modules="all", exclude_modules=["attention", "head", "out_proj"])
    get_peft_model(SiglipVisionModel(config), silent)
    assert "leaves out" not in caplog.text


@pytest.mark.parametrize("make", [RandConfig, AdaSftConfig])
@pytest.mark.parametrize("target", [None, "all-linear"])
def test_a_model_without_linear_layers_gets_an_error_of_ours(make, target):
    model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.LayerNorm(4))
    with pytest.raises(ConfigError, match=r"finds no linear layer in Sequential\. .*target_modules='all'") as error:
        get_peft_model(model, make(target_modules=target, density=0.5))
    assert isinstance(error.value, NoMatchingPeftModuleError)
    if make is RandConfig:
        tuned = get_peft_model(model, RandConfig(density=0.5, target_modules="all"))
        assert set(tuned.peft_config["default"].counts) == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize("make", [RandConfig, AdaSftConfig, BottleneckConfig, MadGConfig])
@pytest.mark.parametrize("tokens", [[], {"embed_tokens": []}])
def test_no_token_at_all_is_no_request(make, tokens):
    with pytest.raises(ConfigError, match=r"trainable_token_indices must name at least one row, got .*leave it out"):
        make(trainable_token_indices=tokens)

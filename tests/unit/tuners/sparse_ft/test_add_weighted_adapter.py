"""add_weighted_adapter in a model: exact sums, heads, names, and a result that saves and reloads."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from peft_sparse import ConfigError, RandConfig, SparseConfig, iter_deltas

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30}
X = torch.arange(10)[None]


def config(seed, **fields):
    return RandConfig(**{"density": 0.3, "seed": seed, "init_weights": False, **fields})


def two_adapters(**second):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    model = get_peft_model(copy.deepcopy(base), config(1))
    model.add_adapter("b", config(2, **second))
    return base, model.eval()


def logits(model, adapters):
    model.base_model.set_adapter(adapters)
    with torch.no_grad():
        return model(X).logits


def test_one_adapter_at_weight_one_is_itself_bit_for_bit():
    _, model = two_adapters()
    model.add_weighted_adapter(["b"], [1.0], "copy")
    for (name, _, _, b), (same, _, _, c) in zip(iter_deltas(model, "b"), iter_deltas(model, "copy"), strict=True):
        assert name == same
        assert torch.equal(b.indices, c.indices)
        assert torch.equal(b.values, c.values)
        assert b.values.data_ptr() != c.values.data_ptr()
    assert torch.equal(logits(model, ["b"]), logits(model, ["copy"]))


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, -2.0], [-1.0, 0.25]])
def test_linear_is_the_weighted_sum_on_the_union(weights):
    base, model = two_adapters()
    model.add_weighted_adapter(["default", "b"], weights, "sum")
    twin = copy.deepcopy(base).double()
    for adapter, weight in zip(["default", "b"], weights, strict=True):
        for name, _, _, delta in iter_deltas(model, adapter):
            twin.get_parameter(name).data += weight * delta.delta.to_dense(dtype=torch.float64)
    torch.testing.assert_close(logits(model, ["sum"]).double(), twin(X).logits.detach(), rtol=1e-4, atol=1e-5)
    if weights == [1.0, 1.0]:
        torch.testing.assert_close(logits(model, ["sum"]), logits(model, ["default", "b"]))


def test_adapters_on_different_targets():
    _, model = two_adapters(target_modules=["q_proj"])
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum")
    counts = model.peft_config["sum"].counts
    assert set(counts) == set(model.peft_config["default"].counts)
    torch.testing.assert_close(logits(model, ["sum"]), logits(model, ["default", "b"]))


@pytest.mark.parametrize("combination_type", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_other_types_prune(combination_type, sign):
    _, model = two_adapters()
    model.add_weighted_adapter(
        ["default", "b"], [1.0, 1.0], "pruned", combination_type, density=0.5, majority_sign_method=sign
    )
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum")
    total, pruned = (sum(model.peft_config[name].counts.values()) for name in ("sum", "pruned"))
    assert 0 < pruned < total
    assert torch.isfinite(logits(model, ["pruned"])).all()


def test_the_result_is_not_activated_nor_trained_and_saves_and_reloads(tmp_path):
    base, model = two_adapters()
    model.add_weighted_adapter(["default", "b"], [1.0, 0.5], "sum")
    assert model.active_adapters == ["default"]
    assert not any(delta.values.requires_grad for _, _, _, delta in iter_deltas(model, "sum"))
    assert all(delta.values.requires_grad for _, _, _, delta in iter_deltas(model, "default"))
    assert type(model.peft_config["sum"]) is SparseConfig
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "sum").eval()
    assert type(reloaded.peft_config["default"]) is SparseConfig
    assert torch.equal(logits(reloaded, ["default"]), logits(model, ["sum"]))


def classifier(heads):
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**SMALL, max_position_embeddings=12)).eval()
    model = get_peft_model(
        base, config(1, target_modules=["query"], modules_to_save=["classifier"] if heads[0] else None)
    )
    model.add_adapter("b", config(2, target_modules=["query"], modules_to_save=["classifier"] if heads[1] else None))
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.shape[0] == 2:
            parameter.data.normal_()
    return model.eval()


@pytest.mark.parametrize("heads", [(True, False), (False, True)])
def test_the_head_comes_from_the_only_adapter_that_has_one(heads):
    model = classifier(heads)
    owner = "default" if heads[0] else "b"
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum")
    wrapper = model.base_model.model.classifier
    assert torch.equal(wrapper.modules_to_save["sum"].weight, wrapper.modules_to_save[owner].weight)
    assert wrapper.modules_to_save["sum"].weight.data_ptr() != wrapper.modules_to_save[owner].weight.data_ptr()
    assert not torch.equal(wrapper.modules_to_save["sum"].weight, wrapper.original_module.weight)
    assert model.peft_config["sum"].modules_to_save == ["classifier"]


def test_head_from_decides_where_several_have_one():
    model = classifier((True, True))
    with pytest.raises(ConfigError, match=r"\['default', 'b'\] all have heads .*head_from="):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum")
    assert list(model.peft_config) == ["default", "b"]
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum", head_from="b")
    wrapper = model.base_model.model.classifier
    assert torch.equal(wrapper.modules_to_save["sum"].weight, wrapper.modules_to_save["b"].weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapters": ["default", "c"]}, r"adapters must name adapters of this model, got \['default', 'c'\]. It has"),
        ({"adapters": [], "weights": []}, "adapters must name adapters of this model"),
        ({"weights": [1.0]}, "weights must hold one number per adapter, got 1 for 2"),
        ({"adapter_name": "b"}, "adapter_name 'b' is taken"),
        ({"combination_type": "svd"}, "combination_type.*linear.*svd"),
        ({"combination_type": "ties"}, "density"),
        ({"weights": [1.0, float("nan")]}, "weights"),
        ({"head_from": "default"}, r"head_from must be one of .*\(\[\]\), got 'default'"),
    ],
)
def test_errors_leave_the_model_as_it_was(arguments, message):
    _, model = two_adapters()
    before = logits(model, ["default"])
    call = {"adapters": ["default", "b"], "weights": [1.0, 1.0], "adapter_name": "new", **arguments}
    with pytest.raises(ConfigError, match=message):
        model.add_weighted_adapter(**call)
    assert list(model.peft_config) == ["default", "b"]
    assert torch.equal(logits(model, ["default"]), before)

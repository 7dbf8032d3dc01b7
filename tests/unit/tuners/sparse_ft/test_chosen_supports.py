"""Supports chosen as the adapter is made: by magnitude, by a function, by chance, or given; and their files."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertModel

from peft_sparse import (
    ConfigError,
    Criterion,
    FormatError,
    GivenConfig,
    LotteryTicketConfig,
    OneShotConfig,
    RandConfig,
    SelectionError,
    iter_deltas,
    layer_budget_from,
)
from tests.support import models


def bert(layers: int = 3) -> nn.Module:
    return models.bert(BertModel, vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=layers)


def supports(model, adapter="default"):
    return {name: delta.indices.tolist() for name, _, _, delta in iter_deltas(model, adapter)}


def squared(weight, gradients):
    return weight.square()


SQUARED = Criterion(squared, uses=("weight",))


@pytest.mark.parametrize("largest", [True, False])
def test_magnitudes_choose_the_k_best_of_all(largest):
    base = bert()
    criterion = "largest_weight" if largest else "smallest_weight"
    model = get_peft_model(copy.deepcopy(base), OneShotConfig(num_weights=100, criterion=criterion))
    found = supports(model)
    assert sum(map(len, found.values())) == 100
    assert sum(model.peft_config["default"].counts.values()) == 100
    everything = torch.cat([base.get_parameter(name).abs().flatten() for name in found])
    chosen = torch.cat([base.get_parameter(name).abs().flatten()[indices] for name, indices in found.items()])
    assert torch.equal(chosen.sort().values, everything.topk(100, largest=largest).values.sort().values)
    ids = torch.arange(6)[None]
    assert torch.equal(model.eval()(ids).last_hidden_state, base.eval()(ids).last_hidden_state)


def test_budgets_select_inside_their_groups():
    base = bert()
    uniform = OneShotConfig(density=0.1, criterion="largest_weight", budget="uniform")
    for name, indices in supports(get_peft_model(copy.deepcopy(base), uniform)).items():
        weight = base.get_parameter(name).abs().flatten()
        assert set(indices) == set(weight.topk(len(indices)).indices.tolist())
        assert abs(len(indices) - 0.1 * weight.numel()) < 1
    layers = OneShotConfig(num_weights=100, criterion="smallest_weight", budget="sc_sft_mlm", target_modules="all")
    found = supports(get_peft_model(copy.deepcopy(base), layers))
    below = {name: indices for name, indices in found.items() if "layer.0." in name}
    assert sum(map(len, below.values())) == 40
    assert sum(map(len, found.values())) == 100


def test_a_function_of_the_weights_alone_chooses_at_once():
    own = supports(get_peft_model(bert(), OneShotConfig(density=0.1, criterion=SQUARED)))
    assert own == supports(get_peft_model(bert(), OneShotConfig(density=0.1, criterion="largest_weight")))


def test_a_function_travels_by_its_name_alone(tmp_path):
    config = OneShotConfig(density=0.1, criterion=SQUARED)
    assert copy.deepcopy(config).criterion == SQUARED
    model = get_peft_model(bert(), config)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["criterion"] == f"callable:{__name__}.squared"
    assert f"by the criterion `callable:{__name__}.squared`" in (tmp_path / "README.md").read_text()
    # Nothing of that name has to exist where the adapter is loaded.
    stored["criterion"] = "callable:no.such.module.function"
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    for trainable in (False, True):
        assert supports(PeftModel.from_pretrained(bert(), tmp_path, is_trainable=trainable)) == supports(model)


def test_nothing_is_scored_again_when_an_adapter_is_loaded(tmp_path):
    model = get_peft_model(bert(), OneShotConfig(density=0.1, criterion="largest_weight"))
    model.save_pretrained(tmp_path)
    other = bert()
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.fill_(torch.nan)
    assert supports(PeftModel.from_pretrained(other, tmp_path, is_trainable=True)) == supports(model)


def test_weights_that_cannot_be_ranked():
    with torch.device("meta"):
        model = bert()
    with pytest.raises(ConfigError, match="on the meta device, and the criterion looks at the weights themselves"):
        get_peft_model(model, OneShotConfig(density=0.1, criterion="largest_weight"))
    model = bert()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(SelectionError, match=r"scores of encoder\.layer\.1\.output\.dense\.weight contain NaN"):
        get_peft_model(model, OneShotConfig(density=0.1, criterion="largest_weight"))
    assert not any("sparse_ft" in name for name, _ in model.named_modules())
    wrong = Criterion(lambda weight, gradients: weight[0], uses=("weight",))
    with pytest.raises(ConfigError, match=r"scores of the weight's shape \(8, 8\), got the shape \(8,\) \(encoder"):
        get_peft_model(bert(), OneShotConfig(density=0.1, criterion=wrong))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"criterion": "fishy"}, r"criterion must be one of \['fisher', .*got 'fishy'"),
        ({"selection_batches": 0}, "selection_batches must be an int >= 1, got 0"),
        ({"selection_passes": 1.5}, r"selection_passes must be an int >= 1, got 1\.5"),
    ],
)
def test_bad_one_shot_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        OneShotConfig(density=0.1, **fields)


# ---- given -------------------------------------------------------------------------------------------

GIVEN = {"encoder.layer.1.output.dense.weight": [17, 3, 40], "pooler.dense.bias": torch.tensor([2])}


def test_given_indices_are_tuned_and_nothing_else(tmp_path):
    config = GivenConfig(support=GIVEN)
    model = get_peft_model(bert(), config)
    expected = {"encoder.layer.1.output.dense.weight": [3, 17, 40], "pooler.dense.bias": [2]}
    assert supports(model) == expected
    assert model.peft_config["default"].counts == {name: len(indices) for name, indices in expected.items()}
    assert config.counts is None
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).support is None
    assert supports(PeftModel.from_pretrained(bert(), tmp_path)) == expected
    assert supports(PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True)) == expected


def test_the_support_of_another_adapter_is_copied(tmp_path):
    source = get_peft_model(bert(), RandConfig(density=0.1, seed=3, init_weights=False, target_modules="all"))
    source.save_pretrained(tmp_path / "source")
    model = get_peft_model(bert(), GivenConfig(support=tmp_path / "source"))
    assert supports(model) == supports(source)
    assert supports(get_peft_model(bert(), GivenConfig(support=str(tmp_path / "source")))) == supports(source)
    assert not any(delta.values.any() for _, _, _, delta in iter_deltas(model))
    live = {name: delta.indices for name, _, _, delta in iter_deltas(source)}
    model.add_adapter("second", GivenConfig(support=live))
    assert supports(model, "second") == supports(source)
    model.save_pretrained(tmp_path / "copy")
    (tmp_path / "source" / "adapter_model.safetensors").unlink()
    assert supports(PeftModel.from_pretrained(bert(), tmp_path / "copy")) == supports(source)
    with pytest.raises(ConfigError, match=r"source' has no adapter_model\.safetensors"):
        get_peft_model(bert(), GivenConfig(support=str(tmp_path / "source")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"support must be \{parameter name: indices\} or the path of a sparse adapter, got None"),
        ({"support": {}}, r"support must be .* got \{\}"),
        ({"support": GIVEN, "density": 0.1}, r"density must not be given beside support.*got 0\.1"),
        ({"support": GIVEN, "target_modules": "all"}, "target_modules must not be given beside support"),
    ],
)
def test_bad_given_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        GivenConfig(**fields)


@pytest.mark.parametrize(
    ("support", "message"),
    [
        ({"pooler.dense.bias": [1, 1]}, "indices of pooler.dense.bias must be strictly ascending"),
        ({"pooler.dense.bias": [8]}, r"indices of pooler.dense.bias must lie in \[0, 8\), .* got 8 to 8"),
        ({"pooler.dense.bias": [-1, 2]}, r"must lie in \[0, 8\), .* got -1 to 2"),
        ({"pooler.dense.bias": [0.5]}, "must be a list of integers, flat row-major positions, got torch.float32"),
        ({"pooler.dense.bias": torch.ones(8, dtype=torch.bool)}, r"got torch.bool.*mask\.flatten\(\)"),
        ({"pooler.dense.bias": [[1]]}, r"got torch.int64 of shape \(1, 1\)"),
        ({"pooler.lense.bias": [1]}, "the adapter tunes 'pooler.lense.bias', which this model does not have"),
    ],
)
def test_supports_that_do_not_fit(support, message):
    model = bert()
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, GivenConfig(support=support))
    assert not any("sparse_ft" in name for name, _ in model.named_modules())


# ---- chance ------------------------------------------------------------------------------------------


def test_bernoulli_draws_every_weight_by_itself():
    base = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 100))
    totals, per_weight = [], torch.zeros(60_000)
    for seed in range(40):
        config = RandConfig(density=0.02, draw="bernoulli", seed=seed, target_modules=["0", "1"])
        model = get_peft_model(copy.deepcopy(base), config)
        found = supports(model)
        assert model.peft_config["default"].counts == {name: len(indices) for name, indices in found.items()}
        assert supports(get_peft_model(copy.deepcopy(base), config)) == found
        totals.append(sum(map(len, found.values())))
        per_weight[found["0.weight"]] += 1
    # 80,000 weights at p = 0.02: 1,600 in the mean, with a standard deviation of 39.6.
    mean = sum(totals) / 40
    deviation = (sum((total - mean) ** 2 for total in totals) / 39) ** 0.5
    assert abs(mean - 1600) < 4 * 39.6 / 40**0.5
    assert 25 < deviation < 56
    assert len(set(totals)) > 20
    # 40 draws at p = 0.02: the share of weights never drawn is 0.98 ** 40 = 0.4457, with a standard error of 0.002.
    assert abs(float((per_weight == 0).float().mean()) - 0.4457) < 0.01


def test_exact_draws_stay_exact_and_are_the_default():
    found = supports(get_peft_model(bert(), RandConfig(num_weights=123, budget="global")))
    assert sum(map(len, found.values())) == 123


def test_bad_draws():
    with pytest.raises(ConfigError, match=r"draw must be one of \['exact', 'bernoulli'\], got 'poisson'"):
        RandConfig(density=0.1, draw="poisson")
    never = RandConfig(num_weights=1, draw="bernoulli", seed=2, target_modules=["0"])
    with pytest.raises(ConfigError, match=r"draw='bernoulli' drew no weight at all with seed=2\. Take another seed"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), never)


def test_with_and_without_embeddings():
    with_them = get_peft_model(bert(), RandConfig(density=0.1, budget="global", target_modules="all"))
    without = get_peft_model(
        bert(), RandConfig(density=0.1, budget="global", target_modules="all", exclude_modules=r".*embed.*")
    )
    names = {name for name in supports(with_them) if name.startswith("embeddings.")}
    assert names == {
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        "embeddings.token_type_embeddings.weight",
        "embeddings.LayerNorm.weight",
        "embeddings.LayerNorm.bias",
    }
    assert supports(without).keys() == supports(with_them).keys() - names
    assert sum(map(len, supports(with_them).values())) == round(0.1 * bert().num_parameters())


# ---- budgets measured from adapters ------------------------------------------------------------------


def by_group(model):
    groups = {}
    for name, indices in supports(model).items():
        group = name.split(".")[0] if "layer." not in name else name.split(".")[2]
        groups[group] = groups.get(group, 0) + len(indices)
    return groups


def test_a_measured_budget_gives_another_adapter_the_same_distribution(tmp_path):
    shown = {"embeddings": 0.5, r"layer\.0\.": 0.3, r"layer\.1\.": 0.0, r"layer\.2\.|pooler": 0.2}
    source = get_peft_model(bert(), RandConfig(density=0.1, budget=shown, target_modules="all"))
    source.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()  # the config alone is read
    budget = layer_budget_from(source)
    assert budget == layer_budget_from(source.peft_config["default"]) == layer_budget_from(tmp_path)
    assert len(budget) == 5
    assert sorted(budget.values())[0] == 0.0
    for config in (
        RandConfig(density=0.1, budget=budget, seed=5, target_modules="all"),
        OneShotConfig(density=0.1, budget=budget, criterion="largest_weight", target_modules="all"),
    ):
        model = get_peft_model(bert(), config)
        assert by_group(model) == by_group(source)
        assert by_group(model)["1"] == 0
    # It is a budget like any other: it lies in the file.
    model.save_pretrained(tmp_path / "measured")
    assert PeftConfig.from_pretrained(tmp_path / "measured").budget == budget


def test_where_nothing_can_be_measured(tmp_path):
    with pytest.raises(ConfigError, match="the adapter tunes no weight"):
        layer_budget_from(get_peft_model(bert(), LotteryTicketConfig(density=0.1)))
    with pytest.raises(ConfigError, match="the adapter tunes no weight"):
        layer_budget_from(RandConfig(density=0.1))
    with pytest.raises(ConfigError, match=r"must be a sparse adapter, one of \['default'\], got 'other'"):
        layer_budget_from(get_peft_model(bert(), RandConfig(density=0.1)), "other")
    with pytest.raises(ConfigError, match=r"has no adapter_config\.json"):
        layer_budget_from(tmp_path)
    for content, message in [("{", "is not valid JSON"), ("[]", "must hold a JSON object, got list")]:
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(FormatError, match=message):
            layer_budget_from(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(FormatError, match=r"is no sparse adapter: .* peft_type 'LORA'"):
        layer_budget_from(str(tmp_path))

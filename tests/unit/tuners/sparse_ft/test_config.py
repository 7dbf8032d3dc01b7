"""SparseConfig: what it accepts, what it refuses and with which words, and how it travels."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import asdict

import pytest
from peft import PeftConfig, get_peft_model
from torch import nn

from peft_sparse import ConfigError, DeftXConfig, LotteryTicketConfig, RandConfig, SparseConfig
from peft_sparse.tuners.sparse_ft.configs.base import METHODS


def request_of(method):
    return {"support": {"q.weight": [3, 1]}} if method == "given" else {"density": 0.25}


@pytest.mark.parametrize(("method", "cls"), METHODS.items())
def test_method_gives_the_subclass(method, cls):
    assert type(SparseConfig(method=method, **request_of(method))) is cls
    assert SparseConfig(method=method, **request_of(method)).method == method


def test_no_method_gives_rand():
    assert type(SparseConfig(density=0.5)) is RandConfig


def test_subclass_fields_pass_through():
    assert SparseConfig(method="rand", density=0.5, seed=7).seed == 7
    assert LotteryTicketConfig(density=0.5).budget == "global"
    assert DeftXConfig(density=0.5).budget == "global"
    assert RandConfig(density=0.5).budget == "uniform"


@pytest.mark.parametrize("method", METHODS)
def test_copies_are_equal_and_of_the_same_class(method):
    config = SparseConfig(method=method, **request_of(method), layers_to_transform=[1])
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(other) is type(config)
        assert asdict(other) == asdict(config)


@pytest.mark.parametrize("method", METHODS)
def test_file_round_trip(method, tmp_path):
    config = SparseConfig(
        method=method,
        num_weights=12,
        budget={"embed": 0.25, "layer": 0.75},
        target_modules=["q"],
        counts={"q.weight": 12},
        l1=0.1,
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert {**asdict(loaded), "peft_version": None} == {**asdict(config), "peft_version": None}


@pytest.mark.parametrize("rank", [1, 1.0, 64, 0.5])
def test_a_rank_stays_a_number_of_directions_or_a_share(rank, tmp_path):
    DeftXConfig(density=0.5, rank=rank).save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert (type(loaded), loaded.rank, type(loaded.rank)) == (DeftXConfig, rank, type(rank))


def test_an_unknown_field_of_a_newer_file_is_dropped_and_ours_are_kept(tmp_path):
    RandConfig(density=0.5, seed=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        loaded = PeftConfig.from_pretrained(tmp_path)
    assert (type(loaded), loaded.seed) == (RandConfig, 3)


def test_an_unknown_method_in_a_file_says_what_to_do(tmp_path):
    RandConfig(density=0.5).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "method": "quantum"}))
    with pytest.raises(ConfigError, match=r"method must be one of .*got 'quantum'.*pip install -U peft-sparse"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of density, num_weights and equivalent_rank, got none"),
        ({"density": 0.1, "num_weights": 3}, "exactly one of density.*density=0.1 and num_weights=3"),
        ({"density": 0}, r"density must be in \(0, 1\], got 0\. To give an absolute number"),
        ({"density": 3}, r"density must be in \(0, 1\], got 3\..*num_weights="),
        ({"density": float("nan")}, r"density must be in \(0, 1\], got nan"),
        ({"density": "0.1"}, r"density must be in \(0, 1\], got '0.1'"),
        ({"density": True}, r"density must be in \(0, 1\], got True"),
        ({"num_weights": 0}, "num_weights must be an int >= 1, got 0"),
        ({"num_weights": 0.5}, r"num_weights must be an int >= 1, got 0\.5.*density="),
        ({"equivalent_rank": -1}, "equivalent_rank must be an int >= 1, got -1"),
        ({"density": 0.1, "density_of": "layers"}, "density_of must be 'targets' or 'model', got 'layers'"),
        (
            {"density": 0.1, "budget": "even"},
            "budget must be one of 'uniform', 'global', 'sc_sft_nli', .* got 'even'",
        ),
        ({"density": 0.1, "budget": {"a": 0.5}}, "shares of the budget must sum to 1, got 0.5"),
        ({"density": 0.1, "budget": {"a": 1.5, "b": -0.5}}, r"share of budget group 'a' must be in \[0, 1\]"),
        ({"density": 0.1, "budget": {"(": 1.0}}, r"budget group '\(' is not a valid regular expression"),
        ({"density": 0.1, "target_modules": "*q"}, r"target_modules: '\*q' is not a valid regular expression"),
        ({"density": 0.1, "exclude_modules": "["}, r"exclude_modules: '\[' is not a valid regular expression"),
        ({"density": 0.1, "layers_pattern": "h"}, "layers_pattern='h' needs layers_to_transform"),
        ({"density": 0.1, "values_dtype": "int8"}, "values_dtype must be one of .*float32.*got 'int8'"),
        ({"density": 0.1, "l1": -1}, "l1 must be a finite number >= 0, got -1"),
        ({"density": 0.1, "l1": float("inf")}, "l1 must be a finite number >= 0, got inf"),
        ({"density": 0.1, "seed": -1}, "seed must be an int >= 0, got -1"),
        ({"density": 0.1, "counts": {"w": -1}}, "counts must map parameter names to numbers of weights"),
        (
            {"density": 0.1, "method": "deft_x", "rank": 12.0},
            r"rank must be a float in \(0, 1\], .*int >= 1.*got 12\.0",
        ),
        ({"density": 0.1, "method": "deft_x", "rank": True}, r"rank must be .*got True.*all directions are rank=1\.0"),
        (
            {"density": 0.1, "method": "deft_x", "residual_density": 2},
            r"residual_density must be in \[0, 1\], .*got 2\. 0 keeps the leading directions alone",
        ),
        (
            {"density": 0.1, "method": "deft_x", "denoise_embeddings": 1},
            "denoise_embeddings must be True or False, got 1",
        ),
        ({"density": 0.1, "method": "spiel"}, "method must be one of .*lottery_ticket.*got 'spiel'"),
    ],
)
def test_errors_name_field_value_rule_and_way_out(fields, message):
    with pytest.raises(ConfigError, match=message):
        SparseConfig(**fields)


def test_a_subclass_refuses_another_method():
    with pytest.raises(ConfigError, match="method must be 'rand' for a RandConfig, got 'lottery_ticket'"):
        RandConfig(density=0.1, method="lottery_ticket")


def test_a_misspelt_field_is_an_error():
    with pytest.raises(TypeError, match="densty"):
        RandConfig(densty=0.1)


@pytest.mark.parametrize("target", [["0"], "all-linear", "all", None])
def test_the_users_config_is_not_changed(target):
    config = RandConfig(density=0.5, target_modules=target, budget={"0": 1.0})
    before = copy.deepcopy(config)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
    assert asdict(config) == asdict(before)
    assert model.peft_config["default"].counts == {"0.weight": 6} if target != "all" else True


def test_the_stored_copy_keeps_request_and_answer_apart():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), RandConfig(density=0.5, target_modules="all-linear"))
    stored = model.peft_config["default"]
    assert (stored.density, stored.target_modules, stored.counts) == (0.5, "all-linear", {"0.weight": 6})

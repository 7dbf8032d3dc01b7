"""Beginners' values: taken where there is one meaning, else answered with the field and the way out."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from peft import PeftConfig

from peft_sparse import (
    AdaSftConfig,
    BottleneckConfig,
    LotteryTicketConfig,
    MadGConfig,
    RandConfig,
    SparseConfig,
    SpielAGConfig,
)
from peft_sparse.checks import check_factors, check_one_of, dtype_named, nearest
from peft_sparse.errors import ConfigError

MEANT = [
    (lambda: RandConfig(densty=0.1), TypeError, "unexpected keyword argument 'densty'. Did you mean 'density'?"),
    (lambda: SparseConfig(method="rand", densty=0.1), TypeError, "Did you mean 'density'?"),
    (lambda: RandConfig(r=8), TypeError, "equivalent_rank=... tunes as many weights as LoRA of that rank"),
    (lambda: LotteryTicketConfig(r=8), TypeError, "equivalent_rank"),
    (lambda: AdaSftConfig(r=8), TypeError, "equivalent_rank"),
    (lambda: RandConfig(sparsity=0.9), TypeError, "density=... is the share of the weights that are tuned"),
    (lambda: BottleneckConfig(r=8), TypeError, "bottleneck_size=..."),
    (lambda: BottleneckConfig(botleneck_size=8), TypeError, "Did you mean 'bottleneck_size'?"),
    (lambda: MadGConfig(langage_dim=8), TypeError, "Did you mean 'language_dim'?"),
    (lambda: RandConfig(0.1), TypeError, "takes its fields by name, such as density=0.01; got 0.1 without one"),
    (lambda: SparseConfig(method="lotery_ticket", density=0.1), ConfigError, "Did you mean 'lottery_ticket'?"),
    (lambda: BottleneckConfig(kind="pfeifer"), ConfigError, "Did you mean 'pfeiffer'?"),
    (lambda: RandConfig(density=0.1, values_dtype=torch.int8), ConfigError, "values_dtype must be one of ['float32'"),
    (lambda: RandConfig(density=0.1, target_modules="q_proj, v_proj"), ConfigError, "['q_proj', 'v_proj']"),
    (lambda: BottleneckConfig(exclude_modules="a,b"), ConfigError, "Write exclude_modules=['a', 'b']"),
    (lambda: RandConfig(density=0.1, target_modules=5), ConfigError, "target_modules must be a list of module names"),
    (lambda: AdaSftConfig(target_modules=[1]), ConfigError, "target_modules must be a list of module names"),
    (lambda: RandConfig(density=0.1, layers_to_transform="1"), ConfigError, "layers_to_transform must be the index"),
    (lambda: BottleneckConfig(leave_out=[True]), ConfigError, "leave_out must be the index of a layer"),
    (lambda: RandConfig(density=0.1, init_weights="gaussian"), ConfigError, "init_weights must be True or False"),
    (lambda: RandConfig(density=0.1, l1=True), ConfigError, "l1 must be a finite number >= 0, got True"),
    (lambda: SpielAGConfig(density=0.1, max_grad_norm=10**400), ConfigError, "max_grad_norm must be a finite"),
    (lambda: BottleneckConfig(scaling=-(10**400)), ConfigError, "scaling must be a finite number"),
    (lambda: check_factors([1.0, 10**400], 2), ConfigError, "weights must be finite numbers, got [1.0, 1000"),
]


@pytest.mark.parametrize(("make", "error", "text"), MEANT)
def test_the_error_names_what_was_meant(make, error, text):
    with pytest.raises(error, match=re.escape(text)):
        make()


@pytest.mark.parametrize("name", ["spiel_ag", "spiel-ag", "SpIEL-AG", "SpielAG", "spiel ag"])
def test_methods_are_taken_in_any_spelling(name):
    config = SparseConfig(method=name, density=0.1)
    assert type(config) is SpielAGConfig
    assert config.method == "spiel_ag"


@pytest.mark.parametrize("value", [torch.bfloat16, "bfloat16", "torch.bfloat16", "bf16"])
def test_dtypes_are_taken_as_torch_names_them(tmp_path, value):
    config = RandConfig(density=0.1, values_dtype=value)
    assert config.values_dtype == "bfloat16"
    config.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).values_dtype == "bfloat16"


@pytest.mark.parametrize("make", [lambda **f: RandConfig(density=0.1, **f), AdaSftConfig, BottleneckConfig, MadGConfig])
def test_one_head_is_a_list_of_one(make):
    assert make(modules_to_save="classifier").modules_to_save == ["classifier"]
    config = make(target_modules=r"(q|v)_proj,?")
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))


def test_a_file_of_a_newer_version_still_loads(tmp_path):
    RandConfig(density=0.1).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 3, "of_a_newer_version": 1'))
    with pytest.warns(UserWarning, match="of_a_newer_version"):
        assert PeftConfig.from_pretrained(str(tmp_path)).seed == 3


def test_the_checks():
    check_one_of("kind", None, [None, "a"])
    with pytest.raises(ConfigError, match=re.escape("kind must be one of ['alpha', 'beta'], got 'Alpa'. Did you mean")):
        check_one_of("kind", "Alpa", ["alpha", "beta"])
    assert nearest("zzz", ["alpha"]) == ""
    assert dtype_named("dtype", "fp16", ["float16"]) == torch.float16
    with pytest.raises(ConfigError, match=r"dtype must be one of \['float16'\], got 'float32'"):
        dtype_named("dtype", torch.float32, ["float16"])

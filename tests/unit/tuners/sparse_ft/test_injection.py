"""Layers put into a model without a PeftModel around it, and into a compiled one."""

from __future__ import annotations

import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn

from peft_sparse import RandConfig, iter_deltas

X = torch.linspace(-1, 1, 12).view(2, 6)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def config(**fields) -> RandConfig:
    return RandConfig(**{"density": 0.5, "target_modules": "all", "init_weights": False, **fields})


def test_a_state_dict_decides_where_layers_go():
    first = inject_adapter_in_model(config(target_modules=["0"]), net())
    state = get_peft_model_state_dict(first)
    second = inject_adapter_in_model(config(density=0.1, target_modules=["0", "2"]), net(), state_dict=state)
    assert {name for name, *_ in iter_deltas(second)} == {"0.weight"}
    set_peft_model_state_dict(second, state)
    assert torch.equal(second(X), first(X))


def test_a_state_dict_into_a_compiled_model():
    state = get_peft_model_state_dict(inject_adapter_in_model(config(), net()))
    compiled = inject_adapter_in_model(config(), torch.compile(net(), backend="eager"), state_dict=state)
    assert {name for name, *_ in iter_deltas(compiled)} == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_an_adapter_made_on_a_compiled_model_loads_into_a_plain_one(tmp_path):
    compiled = get_peft_model(torch.compile(net(), backend="eager"), config())
    compiled.save_pretrained(tmp_path)
    assert set(compiled.peft_config["default"].counts) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    torch.testing.assert_close(PeftModel.from_pretrained(net(), tmp_path)(X), compiled(X))

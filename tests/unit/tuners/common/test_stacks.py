"""Weights that are stacked in one parameter, as the experts of a mixture: a request that leaves them out is told so."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from typer.testing import CliRunner

from peft_sparse import AdaSftConfig, LotteryTicketConfig, RandConfig, iter_deltas, plan_memory
from peft_sparse.cli import app
from tests.support.models import IDS, SMALL, bert, llama

HEADS = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 32}
MIXTRAL = MixtralConfig(**HEADS, num_local_experts=4, architectures=["MixtralForCausalLM"])
QWEN2 = Qwen2MoeConfig(
    **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
)
QWEN3 = Qwen3MoeConfig(**HEADS, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MIXTRAL),
    "qwen2": lambda: Qwen2MoeForCausalLM(QWEN2),
    "qwen3": lambda: Qwen3MoeForCausalLM(QWEN3),
}


def told(caplog):
    found = [record.getMessage() for record in caplog.records if "stacked in one parameter" in record.getMessage()]
    caplog.clear()
    return found


@pytest.mark.parametrize("make_config", [lambda **f: RandConfig(density=0.1, **f), AdaSftConfig], ids=["rand", "ada"])
@pytest.mark.parametrize("name", MODELS)
def test_all_linear_says_which_experts_it_leaves_out(name, make_config, caplog):
    base = MODELS[name]()
    experts = {n: p.numel() for n, p in base.named_parameters() if ".experts." in n}
    total = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, make_config())
    assert not any(".experts." in n for n, p in model.named_parameters() if p.requires_grad)
    (message,) = told(caplog)
    assert "model.layers.*.mlp.experts.down_proj, model.layers.*.mlp.experts.gate_up_proj" in message
    assert f"They hold {sum(experts.values()):,} of the model's {total:,} weights" in message
    assert "LoraConfig(target_parameters=['experts.down_proj', 'experts.gate_up_proj'])" in message
    assert "modules_to_save=['experts']" in message


@pytest.mark.parametrize(
    ("fields", "left_out"),
    [
        ({"target_modules": ["q_proj", "gate_proj", "down_proj"]}, ["experts.down_proj", "experts.gate_up_proj"]),
        ({"target_modules": ["q_proj", "down_proj"]}, ["experts.down_proj"]),
        ({"target_modules": r".*(v_proj|up_proj)"}, ["experts.gate_up_proj"]),
        ({"layers_to_transform": [1]}, ["experts.down_proj", "experts.gate_up_proj"]),
        ({"target_modules": ["q_proj", "v_proj"]}, []),
        ({"exclude_modules": ["experts"]}, []),
        ({"modules_to_save": ["experts"]}, []),
        ({"target_modules": None, "target_parameters": ["q_proj.weight"]}, []),
    ],
)
def test_what_a_request_means(fields, left_out, caplog):
    get_peft_model(MODELS["qwen2"](), RandConfig(density=0.1, **fields))
    messages = told(caplog)
    assert len(messages) == bool(left_out)
    for message in messages:
        assert f"LoraConfig(target_parameters={left_out})" in message


def test_models_without_such_weights_and_files_are_not_told_of(caplog, tmp_path):
    for base in (llama(), bert()):
        get_peft_model(base, RandConfig(density=0.1))
    assert told(caplog) == []
    model = get_peft_model(MODELS["mixtral"](), RandConfig(density=0.1))
    assert len(told(caplog)) == 1
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "again")
    assert told(caplog) == []


def test_experts_can_be_trained_whole():
    torch.manual_seed(0)
    base = MODELS["mixtral"]()
    model = get_peft_model(base, RandConfig(density=0.1, target_modules=["q_proj"], modules_to_save=["experts"]))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in moved if "experts" in n} == {n for n in before if "experts.modules_to_save.default" in n}
    assert moved - {n for n in before if "experts" in n} == {
        f"base_model.model.{n.removesuffix('.weight')}.sparse_ft_weight.default.values" for n, *_ in iter_deltas(model)
    }


def test_plans_say_it_once(caplog, tmp_path):
    MIXTRAL.save_pretrained(tmp_path)
    # A plan makes a model for each phase.
    plan_memory(tmp_path, LotteryTicketConfig(density=0.1), sequence_length=8)
    assert len(told(caplog)) == 1
    arguments = [
        "plan",
        str(tmp_path),
        "--sequence-length",
        "8",
        "--method",
        "lottery_ticket",
        "--gpu",
        "1GB",
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert len(told(caplog)) == 1
    assert json.loads(result.stdout)["fits"]
    plan_memory(tmp_path, RandConfig(density=0.1, exclude_modules=["experts"]), sequence_length=8)
    assert told(caplog) == []

"""Reports on adapters that are no sparse deltas, against the model that they were saved from."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BertModel
from typer.testing import CliRunner

from peft_sparse import AdaSftConfig, BottleneckConfig, FormatError, RandConfig, inspect_adapter
from peft_sparse.cli import app
from tests.support.models import bert

LINEARS = ["query", "value"]
CHANGES = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=LINEARS, init_lora_weights=False),
    "rslora": LoraConfig(r=3, lora_alpha=5, target_modules=LINEARS, init_lora_weights=False, use_rslora=True),
    "shira": ShiraConfig(r=1, target_modules=LINEARS, init_weights=False, random_seed=0),
    "supertuning": SupertuningConfig(sparsity=0.9, target_modules=LINEARS, init_weights=False),
}
OTHERS = {
    "bottleneck": BottleneckConfig(reduction_factor=2),
    "ada_sft": AdaSftConfig(density=0.1, target_modules=LINEARS),
    "dora": LoraConfig(r=2, target_modules=LINEARS, use_dora=True),
}


def saved(folder, config):
    model = get_peft_model(bert(BertModel), config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("config", CHANGES.values(), ids=CHANGES)
def test_the_change_is_that_of_the_weights(tmp_path, config):
    model = saved(tmp_path / "it", config)
    report = inspect_adapter(tmp_path / "it")
    found = {group.name: group.change for group in report.groups}
    for number in range(2):
        layers = [m for n, m in model.named_modules() if hasattr(m, "get_delta_weight") and f"layer.{number}." in n]
        deltas = [layer.get_delta_weight("default").detach() for layer in layers]
        dense = torch.cat([(delta.to_dense() if delta.is_sparse else delta).flatten().double() for delta in deltas])
        assert found[f"encoder.layer.{number}"] == pytest.approx(float(dense.norm()), rel=1e-5)


@pytest.mark.parametrize("config", {**CHANGES, **OTHERS}.values(), ids={**CHANGES, **OTHERS})
def test_every_tensor_of_the_file_is_counted(tmp_path, config):
    saved(tmp_path / "it", config)
    report = inspect_adapter(tmp_path / "it")
    tensors = load_file(tmp_path / "it" / "adapter_model.safetensors")
    assert report.peft_type == config.peft_type
    assert report.numel == sum(tensor.numel() for tensor in tensors.values())
    assert sum(group.tensors for group in report.groups) == len(tensors)
    assert sum(group.norm**2 for group in report.groups) == pytest.approx(
        sum(float(tensor.double().square().sum()) for tensor in tensors.values())
    )
    if config in OTHERS.values():
        assert {group.change for group in report.groups} == {None}


def test_the_command_shows_them_beside_sparse_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved("lora", CHANGES["lora"])
    saved("beside", OTHERS["bottleneck"])
    saved("ours", RandConfig(density=0.1, target_modules=LINEARS))
    shown = CliRunner().invoke(app, ["inspect", "lora", "ours", "beside"])
    assert shown.exit_code == 0
    for text in ("BOTTLENECK", "reduction_factor=2", "beside: tensors by layer of encoder.layer", "LORA", "ours"):
        assert text in shown.output
    made = json.loads(CliRunner().invoke(app, ["inspect", "lora", "ours", "beside", "--json"]).stdout)
    assert [report["peft_type"] for report in made["other_types"]] == ["LORA", "BOTTLENECK"]
    assert [report["name"] for report in made["adapters"]] == ["ours"]


def test_damaged_files_are_refused(tmp_path):
    saved(tmp_path / "it", CHANGES["lora"])
    path = tmp_path / "it" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(FormatError):
        inspect_adapter(tmp_path / "it")


def test_a_file_of_another_type_than_its_config_says_is_refused(tmp_path):
    saved(tmp_path / "it", OTHERS["bottleneck"])
    config = json.loads((tmp_path / "it" / "adapter_config.json").read_text())
    (tmp_path / "it" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
    with pytest.raises(FormatError, match="has none of the tensors of a LORA adapter, which its config says it is"):
        inspect_adapter(tmp_path / "it")

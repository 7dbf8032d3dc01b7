from __future__ import annotations

import os

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_sparse import AdaSftConfig, ConfigError, SelectionError, iter_deltas, sparse_from_ada
from peft_sparse.tuners.ada_sft.iteration import iter_masked
from tests.unit.tuners.ada_sft.test_ada_sft import logits, make, make_bert, make_llama


def changes_of(model, adapter="default"):
    """(W + D) * M - W in float64, from the weights that the layers would merge."""
    found = {}
    for name, layer, _ in iter_masked(model, adapter):
        found[name] = layer.merged_weight([adapter]).double() - layer.original.double()
    return found


@pytest.mark.parametrize("phase", ["mask", "weights", "composed"])
def test_exactly_the_weights_that_changed_most(tmp_path, phase):
    model = make(phase=phase)
    changes = changes_of(model)
    total = sum(change.numel() for change in changes.values())
    deltas = sparse_from_ada(model, density=0.1, save_directory=tmp_path / "sparse")
    count = round(0.1 * total)
    assert sum(delta.count for delta in deltas.values()) == count
    threshold = torch.cat([change.abs().flatten() for change in changes.values()]).topk(count).values.min()
    assert list(deltas) == list(changes)
    for name, delta in deltas.items():
        assert torch.equal(delta.indices.long(), (changes[name].abs().flatten() >= threshold).nonzero().squeeze(1))
        assert torch.equal(delta.values, changes[name].flatten()[delta.indices.long()].float())
    base = make_llama()
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "sparse")
    config = loaded.peft_config["default"]
    assert (config.peft_type.value, config.method, config.density, config.budget) == (
        "SPARSE_FT",
        "fixed",
        0.1,
        "global",
    )
    merged = loaded.merge_and_unload()
    for name, layer, _ in iter_masked(model):
        own, tuned = base.get_parameter(name).flatten(), layer.merged_weight(["default"]).flatten()
        found, places = merged.get_parameter(name).detach().flatten(), deltas[name].indices.long()
        elsewhere = torch.ones_like(own, dtype=torch.bool)
        elsewhere[places] = False
        assert torch.equal(found[elsewhere], own[elsewhere])
        ratio = tuned / own
        is_exact = ((ratio >= 0.5) & (ratio <= 2)) & ~elsewhere
        assert torch.equal(found[is_exact], tuned[is_exact])
        last_bit = torch.finfo(torch.float32).eps * torch.maximum(own.abs(), tuned.abs())
        assert ((found - tuned).abs() <= last_bit)[places].all()
    assert torch.equal(logits(model), logits(make(phase=phase))), "the model is as it was"


def test_at_density_one_it_computes_what_the_adapter_computes(tmp_path):
    model = make()
    sparse_from_ada(model, density=1.0, save_directory=tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_density_and_budget_of_the_config(tmp_path):
    budget = {r"\.0\.": 0.25, r"\.1\.": 0.75}
    model = make(density=0.1, budget=budget, target_modules=["q_proj", "up_proj"])
    numel = sum(masked.numel for _, _, masked in iter_masked(model))
    deltas = sparse_from_ada(model)
    per_layer = [sum(d.count for n, d in deltas.items() if f".{i}." in n) for i in (0, 1)]
    total = round(0.1 * numel)
    assert sum(per_layer) == total
    assert per_layer[0] == pytest.approx(0.25 * total, abs=1)
    even = sparse_from_ada(model, density=0.5, budget="uniform")
    assert all(delta.count == delta.numel // 2 for delta in even.values())


def test_heads_go_with_it_and_it_lives_beside_other_sparse_adapters(tmp_path):
    config = AdaSftConfig(target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS", density=0.2)
    model = get_peft_model(make_bert(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    deltas = sparse_from_ada(model, save_directory=tmp_path / "task")
    model = model.eval()
    loaded = PeftModel.from_pretrained(make_bert(), tmp_path / "task", adapter_name="task").eval()
    assert torch.equal(
        loaded.base_model.model.classifier.modules_to_save["task"].weight,
        model.base_model.model.classifier.modules_to_save["default"].weight,
    )
    assert loaded.peft_config["task"].task_type == "SEQ_CLS"
    for name, _, _, delta in iter_deltas(loaded, "task"):
        assert torch.equal(delta.indices, deltas[name].indices)
        assert torch.equal(delta.values, deltas[name].values)
    loaded.load_adapter(tmp_path / "task", "again")
    loaded.add_weighted_adapter(["task", "again"], [0.5, 0.5], "mean", head_from="task")
    assert "import peft_sparse" in (tmp_path / "task" / "README.md").read_text()
    assert sorted(os.listdir(tmp_path / "task")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_what_cannot_be_made_sparse(tmp_path):
    model = make()
    with pytest.raises(ConfigError, match=r"density must be given, here or in the config of adapter 'default'"):
        sparse_from_ada(model)
    with pytest.raises(ConfigError, match=r"density must be in \(0, 1\], got 7"):
        sparse_from_ada(model, density=7)
    with pytest.raises(ConfigError, match=r"adapter of Ada-SFT, one of \['default'\], got 'nobody'"):
        sparse_from_ada(model, "nobody", density=0.1)
    fresh = get_peft_model(make_llama(), AdaSftConfig())
    with pytest.raises(SelectionError, match=r"only 0 of \d+ moved"):
        sparse_from_ada(fresh, density=0.1, save_directory=tmp_path / "none")
    assert not (tmp_path / "none").exists()

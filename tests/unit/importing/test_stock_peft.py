"""Export to PEFT's own types: stock PEFT loads them, and computes what the sparse adapter computes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from peft_sparse import RandConfig, export_adapter
from peft_sparse.errors import ConfigError
from peft_sparse.importing.stock_peft import _factors
from tests.support.foreign_files import IDS, bert

LINEARS = ["query", "value", "intermediate.dense"]


def trained(folder, *, base=None, **fields):
    """A base on disk, an adapter for it on disk, and the tuned model's logits."""
    base = base or bert(num_labels=3)
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    untouched = copy.deepcopy(base)
    fields = {"density": 0.1, "target_modules": LINEARS, "init_weights": False, **fields}
    model = get_peft_model(base, RandConfig(**fields)).eval()
    model.save_pretrained(folder / "ours")
    with torch.no_grad():
        return untouched, model(IDS).logits


@pytest.mark.parametrize("budget", ["uniform", "global"])
@pytest.mark.parametrize("kind", ["shira", "supertuning"])
def test_stock_peft_computes_the_same_to_the_bit(tmp_path, kind, budget):
    base, expected = trained(tmp_path, budget=budget)
    exported = export_adapter(tmp_path / "ours", tmp_path / "out", to=kind)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path / "out").eval()(IDS).logits, expected)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    values = [t for name, t in tensors.items() if name.endswith(("shira_weight", "supertuning_values"))]
    assert sum(t.numel() for t in values) == exported.num_weights + exported.padding
    assert sum(int(t.count_nonzero()) for t in values) == exported.num_weights
    assert exported.error == 0


@pytest.mark.parametrize("kind", ["shira", "supertuning"])
def test_no_position_is_there_twice(tmp_path, kind):
    trained(tmp_path, budget="global")
    export_adapter(tmp_path / "ours", tmp_path / "out", to=kind)
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        if name.endswith("indices"):
            assert tensor.dtype == torch.int32
            assert torch.unique(tensor, dim=-1).shape == tensor.shape


def test_a_head_goes_with_it(tmp_path):
    base, expected = trained(tmp_path, modules_to_save=["classifier"], task_type="TOKEN_CLS")
    exported = export_adapter(tmp_path / "ours", tmp_path / "out", to="supertuning")
    assert set(exported.heads) == {"classifier.weight", "classifier.bias"}
    torch.nn.init.ones_(base.classifier.weight)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path / "out").eval()(IDS).logits, expected)


def test_it_loads_where_this_package_is_not_imported(interpreter, tmp_path):
    _, expected = trained(tmp_path)
    export_adapter(tmp_path / "ours", tmp_path / "out", to="shira")
    base, out = str(tmp_path / "base"), str(tmp_path / "out")
    code = (
        "import sys, torch\nfrom peft import PeftModel\nfrom transformers import BertForTokenClassification as Bert\n"
        f"model = PeftModel.from_pretrained(Bert.from_pretrained({base!r}), {out!r})\n"
        "assert 'peft_sparse' not in sys.modules\n"
        f"torch.save(model.eval()(torch.arange(2, 12)[None]).logits, {str(tmp_path / 'logits')!r})\n"
    )
    interpreter.run(code)
    assert torch.equal(torch.load(tmp_path / "logits"), expected)


def test_lora_of_full_rank_is_the_difference(tmp_path):
    base, expected = trained(tmp_path)
    exported = export_adapter(tmp_path / "ours", tmp_path / "out", to="lora", rank=16)
    assert exported.error < 1e-6
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, tmp_path / "out").eval()(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_lora_says_what_its_rank_loses(tmp_path):
    trained(tmp_path)
    exported = export_adapter(tmp_path / "ours", tmp_path / "out", to="lora", rank=4)
    ours = get_peft_model(bert(num_labels=3), RandConfig(density=0.1, target_modules=LINEARS, init_weights=False))
    lost = whole = 0.0
    for layer in (m for m in ours.modules() if hasattr(m, "get_delta_weight")):
        singular = torch.linalg.svdvals(layer.get_delta_weight("default").double())
        lost, whole = lost + float(singular[4:].square().sum()), whole + float(singular.square().sum())
    assert exported.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)


def test_lora_on_transposed_layers(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=40)
    base, expected = trained(tmp_path, base=GPT2LMHeadModel(config).eval(), target_modules=["c_attn", "c_fc"])
    export_adapter(tmp_path / "ours", tmp_path / "out", to="lora", rank=16)
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, tmp_path / "out").eval()(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"transformer.h.0.attn.c_attn.weight \(Conv1D\)"):
        export_adapter(tmp_path / "ours", tmp_path / "other", to="shira")
    assert not (tmp_path / "other").exists()


def test_factors_of_a_large_matrix():
    torch.manual_seed(0)
    dense = torch.randn(1100, 5) @ torch.randn(5, 1300)
    up, down = _factors(dense, 7)
    assert (up.shape, down.shape) == ((1100, 7), (7, 1300))
    torch.testing.assert_close(up @ down, dense, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("adapter", "options", "message"),
    [
        ({"target_modules": "all"}, {"to": "shira"}, r"not weights of linear layers.*word_embeddings.weight \(Embed"),
        ({}, {"to": "lora"}, r"sparse difference is of full rank"),
        ({}, {"to": "lora", "rank": 0}, r"rank must be an int >= 1, got 0"),
        ({}, {"to": "shira", "rank": 4}, r"rank is LoRA's"),
        ({}, {"to": "composable-sft", "rank": 4}, r"base and rank are for shira, supertuning, lora"),
        ({}, {"to": "vera"}, r"to must be one of .*'lora'"),
        ({"density": 0.9}, {"to": "shira"}, r"SHiRA has r\(in \+ out\).*Export to supertuning"),
        ({"trainable_token_indices": [1]}, {"to": "lora", "rank": 2}, r"trainable_token_indices"),
    ],
    ids=str,
)
def test_what_cannot_go_is_refused_by_name(tmp_path, adapter, options, message):
    trained(tmp_path, **adapter)
    with pytest.raises(ConfigError, match=message):
        export_adapter(tmp_path / "ours", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_base_that_cannot_be_had_is_asked_for(tmp_path):
    trained(tmp_path)
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"what layers .* tunes has to be known.*base=\.\.\. \(--base\)"):
        export_adapter(tmp_path / "ours", tmp_path / "out", to="shira")
    bert().save_pretrained(tmp_path / "elsewhere")
    exported = export_adapter(tmp_path / "ours", tmp_path / "out", to="shira", base=str(tmp_path / "elsewhere"))
    assert exported.num_weights > 0

"""Saving and loading through PEFT and transformers: what the files hold, and that every way gives the same adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from peft_sparse import RandConfig, iter_deltas
from peft_sparse.checkpoints import native
from peft_sparse.errors import FormatError
from peft_sparse.tuners.sparse_ft.layers.base import SparseLayer
from tests.support.checkpoints import saved_deltas
from tests.support.models import llama

WEIGHTS = native.SOURCE
IDS = torch.arange(10)[None]
UP = "base_model.model.model.layers.0.mlp.up_proj.sparse_ft_weight"


def fresh_base(hidden: int = 32, vocab: int = 64) -> LlamaForCausalLM:
    sizes = {"hidden_size": hidden, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return llama(vocab_size=vocab, **sizes)


def config(**fields) -> RandConfig:
    return RandConfig(**{"density": 0.05, "init_weights": False, "task_type": "CAUSAL_LM", **fields})


def adapted(**fields) -> PeftModel:
    return get_peft_model(fresh_base(), config(**fields)).eval()


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def deltas_of(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    return {parameter: delta.delta.to_dense() for parameter, _, _, delta in iter_deltas(model, name)}


def assert_same_adapter(found: nn.Module, expected: nn.Module, name: str = "default") -> None:
    found_deltas, expected_deltas = deltas_of(found, name), deltas_of(expected)
    assert found_deltas.keys() == expected_deltas.keys()
    for parameter, delta in expected_deltas.items():
        assert torch.equal(found_deltas[parameter], delta)
    assert torch.equal(output(found), output(expected))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_saved_is_loaded(tmp_path, dtype, low_cpu_mem_usage):
    model = adapted(values_dtype=dtype)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert {key.rpartition(".")[2] for key in tensors} == {"values", "_extra_state", native.DIGEST_KEY}
    assert tensors[f"{UP}.values"].dtype == getattr(torch, dtype)
    counts = json.loads((tmp_path / "adapter_config.json").read_text())["counts"]
    assert counts == {name: delta.count for name, delta in saved_deltas(tmp_path / WEIGHTS).items()}
    loaded = PeftModel.from_pretrained(fresh_base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same_adapter(loaded, model)


def test_transformers_writes_the_same_bytes_and_reads_them(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "peft")
    base = fresh_base()
    base.load_adapter(tmp_path / "peft")
    assert_same_adapter(base, model)
    base.save_pretrained(tmp_path / "transformers")
    assert (tmp_path / "transformers" / WEIGHTS).read_bytes() == (tmp_path / "peft" / WEIGHTS).read_bytes()
    assert "import peft_sparse" in (tmp_path / "transformers" / "README.md").read_text()
    assert_same_adapter(PeftModel.from_pretrained(fresh_base(), tmp_path / "transformers"), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("version", "version 9"),
        ("shape", "does not fit the tensors, which have changed"),
        ("count", r"the support holds \d+ indices, but 3 are expected"),
    ],
)
def test_transformers_refuses_what_does_not_fit_a_tensor(tmp_path, change, message):
    adapted().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    if change == "version":
        tensors[f"{UP}._extra_state"][0] = 9
    elif change == "shape":
        tensors[f"{UP}._extra_state"][3] += 1
    else:
        tensors[f"{UP}.values"] = torch.ones(3)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    base = fresh_base()
    before = output(base)
    with pytest.raises(FormatError, match=message):
        base.load_adapter(tmp_path)
    assert torch.equal(output(base), before)


def test_auto_model(tmp_path):
    fresh_base().save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config()).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert_same_adapter(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), model)


def test_loading_into_an_adapter_of_other_sizes(tmp_path):
    """A resume: the adapter in the model has gone on to other counts than the file's."""
    model = adapted()
    model.save_pretrained(tmp_path)
    grown = adapted(density=0.11, seed=3)
    parameters = [delta.values for _, _, _, delta in iter_deltas(grown, "default")]
    grown.load_adapter(tmp_path, "default")
    assert_same_adapter(grown, model)
    assert all(a is b.values for a, (_, _, _, b) in zip(parameters, iter_deltas(grown, "default"), strict=True))
    assert grown.peft_config["default"].counts == model.peft_config["default"].counts


def test_saving_over_the_file_that_a_model_was_loaded_from(tmp_path):
    """Loading may map the file into memory; writing over it must not change what was loaded."""
    model = adapted()
    model.save_pretrained(tmp_path)
    mapped = load_file(tmp_path / WEIGHTS)
    loaded = PeftModel.from_pretrained(fresh_base(), tmp_path, low_cpu_mem_usage=True)
    loaded.save_pretrained(tmp_path)
    assert_same_adapter(loaded, model)
    assert_same_adapter(PeftModel.from_pretrained(fresh_base(), tmp_path), model)
    adapted(seed=5).save_pretrained(tmp_path)
    assert_same_adapter(loaded, model)
    assert native.verify(mapped).keys() == model.peft_config["default"].counts.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "adapter_config.json", WEIGHTS]


@pytest.mark.parametrize("as_second", [False, True])
def test_another_base_model_is_refused_and_left_alone(tmp_path, as_second):
    adapted().save_pretrained(tmp_path)
    other = fresh_base(hidden=64)
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    expected = output(other)
    model = get_peft_model(other, config(init_weights=True)) if as_second else other
    with pytest.raises(
        FormatError, match=r"was made for a parameter of shape .*Load the base model that the adapter was trained on"
    ):
        model.load_adapter(tmp_path, "new") if as_second else PeftModel.from_pretrained(other, tmp_path)
    assert torch.equal(output(model), expected)
    if as_second:
        assert list(model.peft_config) == ["default"]
        assert all("new" not in key for key in model.state_dict())
        other = model.unload()
    assert all(torch.equal(tensor, before[key]) for key, tensor in other.state_dict().items())
    assert not any(isinstance(module, SparseLayer) for module in other.modules())


def test_edited_tensors_need_a_new_digest():
    model = adapted()
    state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    assert native.PREFIX + native.DIGEST_KEY in state
    state[f"{UP}.values"] *= 2
    with pytest.raises(
        FormatError, match=r"Tensors edited on purpose need a new digest: peft_sparse.checkpoints.native.finish"
    ):
        set_peft_model_state_dict(model, state)
    before = deltas_of(model)["model.layers.0.mlp.up_proj.weight"].clone()
    set_peft_model_state_dict(model, native.finish(state))
    assert torch.equal(deltas_of(model)["model.layers.0.mlp.up_proj.weight"], before * 2)


def test_whole_embeddings_may_travel_along(tmp_path):
    """PEFT adds them after the digest; only the model's own embeddings are let through."""
    model = adapted()
    model.base_model.model.model.embed_tokens.weight.data.add_(1)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    key = "base_model.model.model.embed_tokens.weight"
    tensors = load_file(tmp_path / WEIGHTS)
    assert key in tensors
    assert_same_adapter(PeftModel.from_pretrained(fresh_base(), tmp_path), model)
    tensors[key.replace("embed_tokens", "norm")] = torch.ones(32)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    base = fresh_base()
    with pytest.raises(FormatError, match=r"tensor 'model.norm.weight' has no place in this model"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(output(base), output(fresh_base()))


def test_embeddings_that_are_tuned_do_not_bloat_the_file(tmp_path):
    model = adapted(target_modules=["embed_tokens", "q_proj"])
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / WEIGHTS)) == {
        native.PREFIX + name
        for parameter in model.peft_config["default"].counts
        for name in (*native.tensor_names(parameter), native.DIGEST_KEY)
    }
    assert_same_adapter(PeftModel.from_pretrained(fresh_base(), tmp_path), model)


# ---- cards --------------------------------------------------------------------------------------


def test_save_pretrained_writes_a_card(tmp_path):
    base = fresh_base()
    base.name_or_path = base.config._name_or_path = "some-lab/tiny-llama"
    model = get_peft_model(base, config()).eval()
    # Otherwise PEFT asks the Hub whether the base model's vocabulary has grown.
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    card = ModelCard((tmp_path / "README.md").read_text())
    lines = card.text.strip().splitlines()
    assert lines[2].startswith("import peft_sparse ")
    assert lines[3] == "from peft import PeftModel"
    assert {"peft-sparse", "sparse-fine-tuning", "rand", "base_model:adapter:some-lab/tiny-llama"} <= set(
        card.data.tags
    )
    total = sum(delta.count for _, _, _, delta in iter_deltas(model, "default"))
    assert f"- Tuned weights: {total:,} in 14 tensors, 5.0" in card.text
    assert "- Density: 0.05 of the weights of the targeted tensors" in lines
    assert "- Budget: `uniform`" in lines
    assert "| layer | attention | feed-forward | all |" in lines
    once = (tmp_path / "README.md").read_bytes()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert (tmp_path / "README.md").read_bytes() == once


def test_named_adapters_are_saved_with_cards_of_their_own(tmp_path):
    model = get_peft_model(fresh_base(), config(), adapter_name="german").eval()
    model.add_adapter("french", config(seed=1))
    model.save_pretrained(tmp_path)
    root = (tmp_path / "README.md").read_text()
    assert root.split("---\n")[2].splitlines()[2].startswith("import peft_sparse")
    for name in ("german", "french"):
        assert f'subfolder="{name}"' in root
        assert "import peft_sparse" in (tmp_path / name / "README.md").read_text()
        loaded = PeftModel.from_pretrained(fresh_base(), tmp_path, subfolder=name)
        model.set_adapter(name)
        assert torch.equal(output(loaded), output(model))
    (tmp_path / "french" / WEIGHTS).write_bytes(b"")
    with pytest.raises(FormatError, match=r"french.*is not a readable safetensors file"):
        PeftModel.from_pretrained(fresh_base(), tmp_path, subfolder="french")


# ---- old files ----------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def test_version_1_loads_for_ever(tmp_path):
    """A file written when this version was new. Never write it anew: add one for each later version."""
    shutil.copytree(Path(__file__).with_name("files") / "version_1", tmp_path, dirs_exist_ok=True)
    model = PeftModel.from_pretrained(Small(), tmp_path)
    found = {name: delta.delta for name, _, _, delta in iter_deltas(model, "default")}
    assert found["body.weight"].indices.tolist() == [0, 7, 8, 23]
    assert found["body.weight"].values.tolist() == [1.0, -2.0, 0.125, 3.0]
    assert found["body.bias"].indices.tolist() == [3]
    assert found["body.bias"].values.tolist() == [0.5]
    head = model.base_model.model.head.modules_to_save["default"]
    assert head.bias.tolist() == [7.0, 8.0]
    assert head.weight.tolist() == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]

"""Adapters of two types in one model, as transformers' models can hold them: each saves as if it were alone, both train
together, and what cannot be told apart is refused.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_sparse import AdaSftConfig, ConfigError, RandConfig, iter_deltas
from tests.support.adapters import TYPES, adapted, config
from tests.support.models import IDS, llama, logits, picture

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = "adapter_model.safetensors"
OTHERS = {
    "LORA": lambda: LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    "BOTTLENECK": lambda: config("BOTTLENECK"),
    "MAD_G": lambda: config("MAD_G"),
}


def saved_alone(folder: Path, kind: str, **fields) -> Path:
    adapted(kind, llama(), **fields).save_pretrained(folder)
    return folder


def under_another(kind: str, folder: Path, other: str) -> nn.Module:
    """A transformers model with a saved adapter, and around it one of another type."""
    model = llama()
    model.load_adapter(str(folder), adapter_name="ours")
    model.add_adapter(OTHERS[other](), adapter_name="other")
    model.set_adapter("ours")
    return model


def only_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / WEIGHTS)
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("kind", ["SPARSE_FT", "ADA_SFT"])
def test_an_adapter_inside_of_another_types_layers_is_saved_as_if_it_were_alone(tmp_path, kind, other):
    alone = saved_alone(tmp_path / "alone", kind)
    model = under_another(kind, alone, other)
    model.save_pretrained(tmp_path / "again")
    expected, found = only_tensors(alone), only_tensors(tmp_path / "again")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path / "again"))
    torch.testing.assert_close(logits(loaded), logits(model), atol=0, rtol=0)


def test_a_file_that_was_saved_with_the_other_layers_in_its_names_loads(tmp_path):
    """As versions before this one wrote them."""
    model = adapted("SPARSE_FT", llama())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    named = {name.replace("q_proj.", "q_proj.base_layer."): tensor for name, tensor in tensors.items()}
    assert named.keys() != tensors.keys()
    save_file(named, tmp_path / WEIGHTS, {"format": "pt"})
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), str(tmp_path))), expected, atol=0, rtol=0)


def test_tensors_have_the_names_of_the_base_model_inside_of_another_types_layers():
    model = adapted("SPARSE_FT", llama())
    expected = [name for name, *_ in iter_deltas(model)]
    inject_adapter_in_model(OTHERS["LORA"](), model.base_model.model, adapter_name="other")
    assert [name for name, *_ in iter_deltas(model)] == expected


def test_a_sparse_and_a_low_rank_adapter_train_together(tmp_path):
    model = llama()
    model.add_adapter(RandConfig(density=0.2, target_modules="all-linear"), adapter_name="sparse")
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear"), adapter_name="low_rank")
    model.set_adapter(["sparse", "low_rank"])
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    args = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=1e-2, report_to="none", use_cpu=True, save_strategy="no"
    )
    Trainer(model=model, args=args, train_dataset=rows).train()
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in base.items())
    together = logits(model.eval())
    for name in ("sparse", "low_rank"):
        model.set_adapter(name)
        assert not torch.equal(logits(model), logits(llama()))
        model.save_pretrained(tmp_path / name)
    # The sparse one into the weights, and the other on top of them.
    merged = PeftModel.from_pretrained(llama(), str(tmp_path / "sparse")).merge_and_unload()
    served = PeftModel.from_pretrained(merged, str(tmp_path / "low_rank"))
    torch.testing.assert_close(logits(served), together)


@pytest.mark.parametrize("kind", ["SPARSE_FT", "ADA_SFT"])
@pytest.mark.parametrize("verb", ["merge_adapter", "merge_and_unload", "unload"])
def test_what_stands_in_anothers_layer_is_neither_merged_nor_taken_out(kind, verb):
    model = adapted(kind, llama())
    inject_adapter_in_model(OTHERS["LORA"](), model.base_model.model, adapter_name="other")
    before = picture(model)
    with pytest.raises(ConfigError, match=r"proj carries the adapters \['default'\], and around them \['other'\]"):
        getattr(model, verb)()
    assert picture(model) == before


REACHING = {
    "all-linear": {},
    "all": {"target_modules": "all"},
    "by name": {"target_modules": ["up_proj"]},
    "by pattern": {"target_modules": r".*(gate|q)_proj"},
    "parameters": {"target_modules": None, "target_parameters": ["up_proj.weight"]},
    "one layer": {"layers_to_transform": [1]},
}
PAST = {
    "others by name": {"target_modules": ["q_proj", "v_proj"]},
    "others by pattern": {"target_modules": r".*self_attn\.\w+"},
    "excluded": {"exclude_modules": r".*mlp.*"},
}


@pytest.mark.parametrize("kind", ["BOTTLENECK", "MAD_G"])
@pytest.mark.parametrize("fields", REACHING.values(), ids=REACHING)
def test_targets_inside_of_another_types_layers_are_refused_and_not_left_out(kind, fields):
    model = llama()
    model.add_adapter(config(kind), adapter_name="other")
    before = picture(model)
    with pytest.raises(ConfigError, match=r"mlp\.\w+_proj lies inside of a module that .*'other'"):
        model.add_adapter(RandConfig(**{"density": 0.2, **fields}), adapter_name="ours")
    assert picture(model) == before


@pytest.mark.parametrize("fields", PAST.values(), ids=PAST)
def test_targets_beside_another_types_layers_are_tuned(fields):
    counts = []
    for others in ([], [config("BOTTLENECK")]):
        model = llama()
        for other in others:
            model.add_adapter(other, adapter_name="other")
        model.add_adapter(RandConfig(**{"density": 0.2, **fields}), adapter_name="ours")
        counts.append({name: delta.count for name, _, _, delta in iter_deltas(model, "ours")})
    assert counts[0] == counts[1] != {}


def test_a_file_for_what_lies_inside_of_another_types_layers_is_refused_by_name(tmp_path):
    folder = saved_alone(tmp_path, "SPARSE_FT")
    model = llama()
    model.add_adapter(config("BOTTLENECK"), adapter_name="other")
    before = picture(model)
    with pytest.raises(ConfigError, match=r"lies inside of .*Load .*after this one"):
        model.load_adapter(str(folder), adapter_name="ours")
    with pytest.raises(ConfigError, match=r"lies inside of"):
        model.add_adapter(AdaSftConfig(), adapter_name="ours")
    assert picture(model) == before


@pytest.mark.parametrize(("first", "second"), [("BOTTLENECK", "MAD_G"), ("MAD_G", "BOTTLENECK")])
def test_a_hypernetwork_and_plain_bottlenecks_do_not_stand_in_one_model(first, second):
    model = llama()
    model.add_adapter(config(first), adapter_name="first")
    before = picture(model)
    with pytest.raises(ConfigError, match=r"carries the adapters \['first'\]: .*generate_adapter"):
        model.add_adapter(config(second), adapter_name="second")
    assert picture(model) == before


@pytest.mark.parametrize("kind", TYPES)
def test_a_second_adapter_of_the_same_type_is_no_other_type(kind):
    model = get_peft_model(llama(), config(kind), adapter_name="a")
    model.add_adapter("b", config(kind))
    if kind in ("SPARSE_FT", "ADA_SFT"):
        model.merge_adapter()
        model.unmerge_adapter()
    model.unload()

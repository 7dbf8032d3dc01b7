"""A folder that cannot be loaded leaves the model as it was: of all tuner types, through every way in."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from peft_sparse import ConfigError, FormatError
from tests.support.adapters import TYPES, adapted, config
from tests.support.models import llama, logits, picture

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = "adapter_model.safetensors"
# An adapter that goes where the first one does not, with a head and rows of tokens.
NARROW = {
    "SPARSE_FT": {"target_modules": ["q_proj"]},
    "ADA_SFT": {"target_modules": ["q_proj"]},
    "BOTTLENECK": {"kind": "pfeiffer"},
    "MAD_G": {"kind": "pfeiffer"},
}
WIDE = {
    "SPARSE_FT": {"target_modules": ["q_proj", "v_proj"]},
    "ADA_SFT": {"target_modules": ["q_proj", "v_proj"]},
    "BOTTLENECK": {"kind": "houlsby"},
    "MAD_G": {"kind": "houlsby"},
}
BESIDE = {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [1, 2]}}


def without_weights(folder: Path, kind: str) -> None:
    (folder / WEIGHTS).unlink()


def cut_off(folder: Path, kind: str) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def no_safetensors(folder: Path, kind: str) -> None:
    (folder / WEIGHTS).write_bytes(b"<html>404</html>")


def no_pickle(folder: Path, kind: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"<html>404</html>")


def pickled_for_another_model(folder: Path, kind: str) -> None:
    (folder / WEIGHTS).unlink()
    model = adapted(kind, llama(hidden_size=8), **NARROW[kind])
    model.save_pretrained(folder / "narrow")
    torch.save(load_file(folder / "narrow" / WEIGHTS), folder / "adapter_model.bin")
    shutil.rmtree(folder / "narrow")


def of_another_method(folder: Path, kind: str) -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules="all-linear"))
    model.save_pretrained(folder / "lora")
    shutil.move(folder / "lora" / WEIGHTS, folder / WEIGHTS)
    shutil.rmtree(folder / "lora")


def of_another_model(folder: Path, kind: str) -> None:
    adapted(kind, llama(hidden_size=8), **WIDE[kind]).save_pretrained(folder / "other")
    shutil.move(folder / "other" / WEIGHTS, folder / WEIGHTS)
    shutil.rmtree(folder / "other")


def lacking_a_tensor(folder: Path, kind: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key in tensors if ".1." in key and kind.lower() in key)
    save_file({k: t for k, t in tensors.items() if k != key}, folder / WEIGHTS, {"format": "pt"})


def with_a_tensor_too_many(folder: Path, kind: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key in tensors if ".1." in key and kind.lower() in key)
    save_file({**tensors, key.replace(".1.", ".7."): tensors[key].clone()}, folder / WEIGHTS, {"format": "pt"})


def with_nan(folder: Path, kind: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key, t in tensors.items() if t.is_floating_point() and kind.lower() in key)
    tensors[key].view(-1)[0] = float("nan")
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


FAULTS = (
    without_weights,
    cut_off,
    no_safetensors,
    no_pickle,
    pickled_for_another_model,
    of_another_method,
    of_another_model,
    lacking_a_tensor,
    with_a_tensor_too_many,
    with_nan,
)


def by_peft(model: nn.Module, folder: Path, name: str) -> None:
    if isinstance(model, PeftModel):
        model.load_adapter(folder, name)
    else:
        PeftModel.from_pretrained(model, folder, adapter_name=name)


def by_peft_to_train(model: nn.Module, folder: Path, name: str) -> None:
    if isinstance(model, PeftModel):
        model.load_adapter(folder, name, is_trainable=True, low_cpu_mem_usage=True)
    else:
        PeftModel.from_pretrained(model, folder, adapter_name=name, is_trainable=True, low_cpu_mem_usage=True)


def by_transformers(model: nn.Module, folder: Path, name: str) -> None:
    model.load_adapter(str(folder), adapter_name=name)


WAYS: dict[str, tuple[Callable[..., None], Callable[[str], nn.Module]]] = {
    "first, PEFT": (by_peft, lambda kind: llama()),
    "first to train, PEFT": (by_peft_to_train, lambda kind: llama()),
    "first, transformers": (by_transformers, lambda kind: llama()),
    "second, PEFT": (by_peft, lambda kind: adapted(kind, llama(), "a", **NARROW[kind])),
    "second to train, PEFT": (by_peft_to_train, lambda kind: adapted(kind, llama(), "a", **NARROW[kind])),
    "second, transformers": (by_transformers, lambda kind: natively(kind)),
}


def natively(kind: str) -> nn.Module:
    """transformers' model with an adapter "a"."""
    model = llama()
    adapted(kind, model, "a", **NARROW[kind])
    model._hf_peft_config_loaded = True
    return model


def saved(folder: Path, kind: str, **fields) -> Path:
    adapted(kind, llama(), **{**WIDE[kind], **fields}).save_pretrained(folder)
    return folder


def flags(model: nn.Module) -> tuple[object, ...]:
    own = vars(getattr(model, "base_model", model)).get("active_adapter")
    training = {name: module.training for name, module in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    return own, getattr(model, "_hf_peft_config_loaded", None), training, parameters


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", TYPES)
def test_what_cannot_be_loaded_leaves_the_model_as_it_was(tmp_path, kind, way):
    whole = saved(tmp_path / "whole", kind, **BESIDE)
    load, make = WAYS[way]
    model = make(kind)
    next(p for n, p in model.named_parameters() if n.endswith("model.norm.weight")).requires_grad_(way.startswith("s"))
    before, flagged = picture(model), flags(model)
    for fault in FAULTS:
        folder = tmp_path / fault.__name__
        shutil.copytree(whole, folder)
        fault(folder, kind)
        with pytest.raises((ValueError, OSError, RuntimeError, LookupError, pickle.UnpicklingError)) as error:
            load(model, folder, "new")
        if fault is without_weights:
            assert f"'{folder}' has no {WEIGHTS}" in str(error.value)
        after = picture(model)
        for part in before:
            assert after[part] == before[part], (fault.__name__, part, error.value)
        assert flags(model) == flagged, fault.__name__
    # The name is free, and what is whole is loaded as into a model that never saw the others.
    load(model, whole, "new")
    expected = make(kind)
    load(expected, whole, "new")
    if way.startswith("second"):
        model.set_adapter("new")
        expected.set_adapter("new")
        assert torch.equal(logits(model.eval()), logits(expected.eval()))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ConnectionError, MemoryError])
def test_what_stops_a_load_leaves_the_model_as_it_was(tmp_path, monkeypatch, kind, error):
    saved(tmp_path, kind)

    def stop(*args, **kwargs):
        raise error("in the middle")

    monkeypatch.setattr("peft.peft_model.load_peft_weights", stop)
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel._load_pretrained_model", stop)
    for way in ("first, PEFT", "first, transformers", "second, PEFT", "second, transformers"):
        load, make = WAYS[way]
        model = make(kind)
        before, flagged = picture(model), flags(model)
        with pytest.raises(error, match="in the middle"):
            load(model, tmp_path, "new")
        assert picture(model) == before, way
        assert flags(model) == flagged, way


@pytest.mark.parametrize("kind", TYPES)
def test_models_that_are_made_with_an_adapter_are_whole_or_not_made(tmp_path, kind):
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapted(kind, base, **WIDE[kind]).save_pretrained(tmp_path / "whole")
    settings = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    expected = logits(PeftModel.from_pretrained(llama(), tmp_path / "whole"))
    for auto in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        assert torch.equal(logits(auto.from_pretrained(tmp_path / "whole")), expected)
    for fault in (without_weights, of_another_method, of_another_model, lacking_a_tensor, with_nan):
        folder = tmp_path / fault.__name__
        shutil.copytree(tmp_path / "whole", folder)
        fault(folder, kind)
        for auto in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
            with pytest.raises((ValueError, RuntimeError, OSError)):
                auto.from_pretrained(folder)


@pytest.mark.parametrize("kind", TYPES)
def test_a_model_without_a_tuner_gives_the_adapter_of_a_refused_file_back(tmp_path, kind):
    of_another_model(saved(tmp_path, kind), kind)
    model = llama()
    model.model.norm.weight.requires_grad_(False)
    before, flagged = picture(model), flags(model)
    request = config(kind, **WIDE[kind], **BESIDE)
    request.inference_mode = True
    inject_adapter_in_model(request, model)
    with pytest.raises((FormatError, KeyError)):
        set_peft_model_state_dict(model, load_file(tmp_path / WEIGHTS) | heads())
    assert picture(model) == before
    assert flags(model) == flagged


def heads() -> dict[str, torch.Tensor]:
    rows = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    return {"lm_head.weight": torch.zeros(20, 16), rows: torch.zeros(2, 16)}


@pytest.mark.parametrize("kind", ["SPARSE_FT", "ADA_SFT"])
def test_what_is_merged_stays_merged(tmp_path, kind):
    model = adapted(kind, llama(), "a", **NARROW[kind])
    model.merge_adapter()
    before = picture(model)
    lacking_a_tensor(saved(tmp_path, kind), kind)
    with pytest.raises(FormatError):
        model.load_adapter(tmp_path, "new")
    assert picture(model) == before
    assert all(layer.merged_adapters == ["a"] for layer in model.base_model.tuned_layers())


def test_an_adapter_that_holds_something_stays_where_another_folder_is_empty(tmp_path):
    model = adapted("SPARSE_FT", llama())
    model.save_pretrained(tmp_path)
    without_weights(tmp_path, "SPARSE_FT")
    before = picture(model)
    with pytest.raises(ConfigError, match=f"'{tmp_path}' has no {WEIGHTS}, the weights of the adapter"):
        model.load_adapter(tmp_path, "default")
    assert picture(model) == before


@pytest.mark.parametrize("kind", TYPES)
def test_an_adapter_of_which_rows_of_tokens_alone_were_trained_stays(tmp_path, kind):
    whole = saved(tmp_path / "whole", kind, **BESIDE)
    rows = PeftModel.from_pretrained(llama(), whole)
    request = copy.deepcopy(rows.peft_config["default"])
    model = get_peft_model(llama(), request).eval()
    embedding = model.base_model.model.model.embed_tokens.token_adapter
    embedding.trainable_tokens_delta["default"].data += 1
    before = picture(model)
    bad = {key: tensor for key, tensor in load_file(whole / WEIGHTS).items() if ".layers.1." not in key}
    with pytest.raises(FormatError):
        set_peft_model_state_dict(model, bad)
    assert picture(model) == before


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_that_is_written_anew_changes_no_model_that_was_loaded_from_it(tmp_path, kind):
    saved(tmp_path, kind, **BESIDE)
    models = [llama(), PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)]
    models[0].load_adapter(str(tmp_path))
    before = [picture(model) for model in models]
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.write(b"\xff" * (tmp_path / WEIGHTS).stat().st_size)
    assert [picture(model) for model in models] == before


@pytest.mark.parametrize("kind", ["SPARSE_FT", "ADA_SFT"])
def test_adapters_of_other_types_are_computed_with_or_refused(tmp_path, kind):
    """transformers' models can hold several types: ours inside of LoRA's layers, and not around them."""
    lora = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    ours = adapted(kind, llama(), **NARROW[kind])
    ours.save_pretrained(tmp_path / "ours")
    model = llama()
    model.load_adapter(str(tmp_path / "ours"), adapter_name="ours")
    model.load_adapter(str(tmp_path / "lora"), adapter_name="lora")
    model.set_adapter(["ours", "lora"])
    expected = PeftModel.from_pretrained(ours.merge_and_unload(), tmp_path / "lora")
    torch.testing.assert_close(logits(model), logits(expected))
    model = llama()
    model.load_adapter(str(tmp_path / "lora"), adapter_name="lora")
    before = picture(model)
    with pytest.raises(ConfigError, match=r"q_proj carries the adapters \['lora'\] of another type .*after this one"):
        model.load_adapter(str(tmp_path / "ours"), adapter_name="ours")
    assert picture(model) == before


@pytest.mark.parametrize("kind", TYPES)
def test_rows_of_tokens_that_peft_casts_are_those_that_were_made(tmp_path, kind):
    """PEFT casts rows of a model in 16 bits to float32 once they are made: that is no training."""
    of_another_model(saved(tmp_path, kind, trainable_token_indices=[1, 2]), kind)
    tensors = load_file(tmp_path / WEIGHTS)
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    save_file({**tensors, rows: torch.zeros(2, 16)}, tmp_path / WEIGHTS, {"format": "pt"})
    base = llama().bfloat16()
    before = {name: type(module) for name, module in base.named_modules()}
    for arguments in ({}, {"autocast_adapter_dtype": False}, {"low_cpu_mem_usage": True}):
        with pytest.raises(FormatError):
            PeftModel.from_pretrained(base, tmp_path, **arguments)
        assert {name: type(module) for name, module in base.named_modules()} == before


def test_transformers_loads_from_a_subfolder_as_it_does_other_adapters(tmp_path):
    model = adapted("SPARSE_FT", llama(), "a", "b")
    model.save_pretrained(tmp_path)
    for name in ("a", "b"):
        loaded = llama()
        loaded.load_adapter(str(tmp_path), adapter_name="x", adapter_kwargs={"subfolder": name})
        model.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model))
    (tmp_path / "b" / WEIGHTS).unlink()
    before = picture(loaded)
    with pytest.raises(ConfigError, match=f"'{tmp_path}/b' has no {WEIGHTS}"):
        loaded.load_adapter(str(tmp_path), adapter_name="y", adapter_kwargs={"subfolder": "b"})
    assert picture(loaded) == before

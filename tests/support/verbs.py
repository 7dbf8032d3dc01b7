"""PEFT's verbs, each a function that tries it on a case and compares with the dense model. The table is at the end."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from tests.support.sparse import (
    IDS,
    Case,
    base_parameters,
    close,
    dense_deltas,
    fill,
    gradients_by_the_twin,
    logits,
    trained_values,
    untouched,
)


def get(case: Case, folder: Path) -> None:
    base, config = case.base(), case.config(init_weights=True)
    request = copy.deepcopy(config)
    model = get_peft_model(case.base(), config).eval()
    assert type(model.base_model) is PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    assert torch.equal(logits(model), logits(base)), "a fresh adapter is the identity, bit for bit"
    assert config == request, "the user's config is not changed"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(model.base_model.prefix in name for name in trained)
    model = case.model()
    close(logits(model), case.expected(dense_deltas(model, "default")))


def add_and_switch(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    a, b = dense_deltas(model, "a"), dense_deltas(model, "b")
    close(logits(model), case.expected(a))
    model.set_adapter("b")
    close(logits(model), case.expected(b))
    model.set_adapter("a")
    close(logits(model), case.expected(a))
    untouched(model, case.base())


def add_up(case: Case, folder: Path) -> None:
    model = case.model("a", "b", "c")
    model.base_model.set_adapter(["c", "a"])
    close(logits(model), case.expected(dense_deltas(model, "a"), dense_deltas(model, "c")))


def frozen_beside_training(case: Case, folder: Path) -> None:
    model = case.model("language", "task")
    model.base_model.set_adapter(["language", "task"])
    model.set_requires_grad("language", requires_grad=False)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    language, task = dense_deltas(model, "language"), dense_deltas(model, "task")
    twin = case.dense(language, task).train()
    twin(input_ids=IDS, labels=IDS).loss.backward()
    assert all(values.grad is None for values in trained_values(model, "language"))
    found, expected = trained_values(model, "task"), gradients_by_the_twin(model, "task", twin)
    for values, gradient in zip(found, expected, strict=True):
        rtol = 1e-2 if values.dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(values.grad.double(), gradient, rtol=rtol, atol=1e-6)


def disable(case: Case, folder: Path) -> None:
    model = case.model()
    expected, own = case.expected(dense_deltas(model, "default")), logits(case.base())
    with model.disable_adapter():
        assert torch.equal(logits(model), own)
    close(logits(model), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), own)
    close(logits(model), expected)
    untouched(model, case.base())


def delete(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    b = dense_deltas(model, "b")
    model.set_adapter("b")
    model.delete_adapter("a")
    close(logits(model), case.expected(b))
    assert list(model.peft_config) == ["b"]
    assert not any(".a." in key for key in model.state_dict())
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("a")


def save_and_load(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    a, b = dense_deltas(model, "a"), dense_deltas(model, "b")
    model.save_pretrained(folder)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in (folder / "a").iterdir()}
    for lean in (False, True):
        loaded = PeftModel.from_pretrained(case.base(), folder / "a", low_cpu_mem_usage=lean).eval()
        close(logits(loaded), case.expected(a))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        loaded.load_adapter(folder / "b", adapter_name="second", low_cpu_mem_usage=lean)
        close(logits(loaded), case.expected(a))
        loaded.set_adapter("second")
        close(logits(loaded), case.expected(b))
        untouched(loaded, case.base())
    loaded = PeftModel.from_pretrained(case.base(), folder / "a", is_trainable=True)
    assert all(values.requires_grad for values in trained_values(loaded))
    trainable = sum(p.numel() for p in loaded.parameters() if p.requires_grad)
    assert trainable == sum(values.numel() for values in trained_values(loaded))


def merge_and_unmerge(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    a, b = dense_deltas(model, "a"), dense_deltas(model, "b")
    for names, parts in ((None, [a]), (["b"], [b]), (["a", "b"], [a, b])):
        model.merge_adapter(adapter_names=names, safe_merge=True)
        close(logits(model), case.expected(*parts))
        twin = dict(case.dense(*parts).named_parameters())
        for name, parameter in base_parameters(model).items():
            close(parameter, twin[name])
        model.unmerge_adapter()
        untouched(model, case.base())
        close(logits(model), case.expected(a))


def merge_one_after_the_other(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    model.merge_adapter(adapter_names=["a"])
    model.merge_adapter(adapter_names=["b"])
    close(logits(model), case.expected(dense_deltas(model, "a"), dense_deltas(model, "b")))
    model.unmerge_adapter()
    untouched(model, case.base())


def merge_and_unload(case: Case, folder: Path) -> None:
    for safe in (False, True):
        model = case.model("a", "b")
        a, b = dense_deltas(model, "a"), dense_deltas(model, "b")
        merged = model.merge_and_unload(safe_merge=safe, adapter_names=["a", "b"])
        assert type(merged) is type(case.base())
        assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
        assert merged.state_dict().keys() == case.base().state_dict().keys()
        close(logits(merged), case.expected(a, b))
    merged.save_pretrained(folder)
    close(logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)), case.expected(a, b))


def safe_merge_refuses_nan(case: Case, folder: Path) -> None:
    model = case.model()
    trained_values(model)[0].data.view(-1)[0] = torch.nan
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            merge(safe_merge=True)
        untouched(model, case.base())


def unload(case: Case, folder: Path) -> None:
    model = case.model()
    model.merge_adapter()
    plain = model.unload()
    assert type(plain) is type(case.base())
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
    untouched(plain, case.base())


def one_adapter_per_example(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    if case.kind == "gpt2" and any("wpe" in name for name in dense_deltas(model, "a")):
        # One row of positions serves the whole batch, so no example can have its own.
        with pytest.raises(ValueError, match="one adapter per example"):
            logits(model, adapter_names=["b", "__base__", "a"])
        return
    found = logits(model, adapter_names=["b", "__base__", "a"])
    rows = (case.expected(dense_deltas(model, "b")), case.expected(), case.expected(dense_deltas(model, "a")))
    close(found, torch.stack([row[i] for i, row in enumerate(rows)]))
    with pytest.raises(ValueError, match="nobody"):
        logits(model, adapter_names=["nobody", "a", "a"])
    untouched(model, case.base())


def inject(case: Case, folder: Path) -> None:
    source = case.model()
    expected = case.expected(dense_deltas(source, "default"))
    for lean in (False, True):
        model = inject_adapter_in_model(case.config(), case.base(), low_cpu_mem_usage=lean)
        outcome = set_peft_model_state_dict(model, get_peft_model_state_dict(source), low_cpu_mem_usage=lean)
        assert not outcome.unexpected_keys
        close(logits(model.eval()), expected)
        state = get_peft_model_state_dict(model)
        assert state.keys() == {key.removeprefix("base_model.model.") for key in get_peft_model_state_dict(source)}


def through_transformers(case: Case, folder: Path) -> None:
    source = case.model()
    fresh = dense_deltas(source, "default")
    source.save_pretrained(folder / "peft")
    model = case.base()
    model.load_adapter(folder / "peft", adapter_name="loaded")
    close(logits(model), case.expected(fresh))
    model.add_adapter(case.config(), adapter_name="added")
    fill(model, "added", 5)
    added = dense_deltas(model, "added")
    close(logits(model), case.expected(added))
    model.set_adapter("loaded")
    close(logits(model), case.expected(fresh))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(case.base()))
    model.enable_adapters()
    model.set_adapter("added")
    model.save_pretrained(folder / "own")
    assert (folder / "own" / "adapter_model.safetensors").exists()
    close(logits(PeftModel.from_pretrained(case.base(), folder / "own")), case.expected(added))
    again = case.base()
    again.load_adapter(folder / "own")
    close(logits(again), case.expected(added))
    model.delete_adapter("loaded")
    close(logits(model), case.expected(added))


def auto(case: Case, folder: Path) -> None:
    case.base().save_pretrained(folder / "base")
    config = case.config(base_model_name_or_path=str(folder / "base"))
    model = get_peft_model(case.base(), config).eval()
    fill(model, "default", 3)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.float64)
    close(logits(loaded), case.expected(dense_deltas(model, "default")))
    assert type(PeftConfig.from_pretrained(folder / "adapter")) is type(config)
    close(logits(AutoModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.float64)), logits(loaded))


def status(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    whole = get_model_status(model)
    assert (whole.active_adapters, whole.enabled, whole.merged_adapters) == (["a"], True, [])
    assert sorted(whole.available_adapters) == ["a", "b"]
    assert whole.peft_types == dict.fromkeys("ab", case.config().peft_type.value)
    assert whole.trainable_params == sum(values.numel() for values in trained_values(model, "a"))
    # PEFT calls everything with the prefix in its name an adapter parameter.
    own = [p for name, p in model.named_parameters() if model.base_model.prefix in name]
    assert whole.total_params == sum(p.numel() for p in [*case.base().parameters(), *own])
    layers = get_layer_status(model)
    assert len(layers) == len({name.rpartition(".")[0] for name in dense_deltas(model, "a")})
    model.merge_adapter(adapter_names=["b"])
    assert get_model_status(model).merged_adapters == ["b"]


def reference_for_dpo(case: Case, folder: Path) -> None:
    # What trl's DPOTrainer does: the same config object, then the values by the adapter's name in the parameter's.
    model = case.model()
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    close(logits(model), case.expected(dense_deltas(model, "default")))
    for values in trained_values(model):
        values.data += 1
    close(logits(model), case.expected(dense_deltas(model, "ref")))


def deep_copy(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    a, b = dense_deltas(model, "a"), dense_deltas(model, "b")
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        twin = copy.deepcopy(model)
        for name in "ab":
            for values in trained_values(model, name):
                values.data.mul_(-3)
        close(logits(twin), case.expected(a))
        if merged:
            twin.unmerge_adapter()
        untouched(twin, case.base())
        twin.set_adapter("b")
        close(logits(twin), case.expected(b))
        fill(model, "a", 0)
        fill(model, "b", 1)


def pickled_config(case: Case, folder: Path) -> None:
    for config in (case.config(), case.model().peft_config["default"]):
        again = pickle.loads(pickle.dumps(config))
        assert type(again) is type(config)
        assert again == config


def gradient_checkpointing(case: Case, folder: Path) -> None:
    found = []
    for reentrant in (None, False, True):
        model = case.model().train()
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([values.grad.clone() for values in trained_values(model)])
    for plain, first, second in zip(*found, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(first, plain, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(second, plain, rtol=1e-6, atol=1e-9)


def generate(case: Case, folder: Path) -> None:
    model = case.model()
    twin = case.dense(dense_deltas(model, "default"))
    for options in ({}, {"num_beams": 3}):
        arguments = {"input_ids": IDS[:, :2], "max_new_tokens": 6, "do_sample": False, **options}
        assert torch.equal(model.generate(**arguments), twin.generate(**arguments))


def train_save_resume(case: Case, folder: Path) -> None:
    model = case.model().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = dense_deltas(model, "default")
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    after = dense_deltas(model, "default")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    untouched(model, case.base())
    model.save_pretrained(folder)
    fill(model, "default", 9)
    # What transformers' Trainer does to resume: load into the adapter that is there.
    model.load_adapter(folder, adapter_name="default", is_trainable=True)
    close(logits(model.eval()), case.expected(after))


VERBS: dict[str, Callable[[Case, Path], None]] = {
    "get_peft_model": get,
    "add_adapter, set_adapter": add_and_switch,
    "set_adapter of several": add_up,
    "a frozen adapter beside one that trains": frozen_beside_training,
    "disable_adapter": disable,
    "delete_adapter": delete,
    "save_pretrained, from_pretrained, load_adapter": save_and_load,
    "merge_adapter, unmerge_adapter": merge_and_unmerge,
    "merge_adapter one after the other": merge_one_after_the_other,
    "merge_and_unload": merge_and_unload,
    "safe_merge": safe_merge_refuses_nan,
    "unload": unload,
    "adapter_names": one_adapter_per_example,
    "inject_adapter_in_model": inject,
    "transformers' own verbs": through_transformers,
    "AutoPeftModel": auto,
    "get_model_status, get_layer_status": status,
    "DPO's reference adapter": reference_for_dpo,
    "deepcopy": deep_copy,
    "pickle of the config": pickled_config,
    "gradient checkpointing": gradient_checkpointing,
    "generate": generate,
    "train, save, resume": train_save_resume,
}

"""PEFT's verbs for bottleneck adapters, each a function that tries it on a case and compares with the formulas."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer

from peft_sparse import BottleneckModel
from peft_sparse.tuners.bottleneck.own_weights import iter_layers
from tests.support.bottleneck import IDS, Case, close, fill, logits, parameters_of, tensors_of, untouched


def get(case: Case, folder: Path) -> None:
    base = case.base()
    config = case.config(init_weights=True, init="identity")
    request = copy.deepcopy(config)
    model = get_peft_model(case.base(), config).eval()
    assert isinstance(model.base_model, BottleneckModel)
    close(logits(model), logits(base))
    assert config == request, "the user's config is not changed"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".bottleneck_adapters.default." in name for name in trained)
    model = get_peft_model(case.base(), case.config(init_weights=True)).eval()
    found = logits(model)
    assert not torch.equal(found, logits(base))
    torch.testing.assert_close(found, logits(base), rtol=0, atol=0.05)
    model = case.model()
    close(logits(model), case.expected(tensors_of(model, "default")))
    assert (logits(model) - logits(base)).abs().max() > 1e-2


def add_and_switch(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    a, b = tensors_of(model, "a"), tensors_of(model, "b")
    close(logits(model), case.expected(a))
    model.set_adapter("b")
    close(logits(model), case.expected(b))
    model.set_adapter("a")
    close(logits(model), case.expected(a))
    untouched(model, case.base())


def stack(case: Case, folder: Path) -> None:
    model = case.model("a", "b", "c")
    a, c = tensors_of(model, "a"), tensors_of(model, "c")
    model.base_model.set_adapter(["c", "a"])
    close(logits(model), case.expected(c, a))
    if "parallel" not in case.request:
        assert (case.expected(c, a) - case.expected(a, c)).abs().max() > 1e-4, "the order matters"


def frozen_beside_training(case: Case, folder: Path) -> None:
    model = case.model("language", "task")
    model.base_model.set_adapter(["language", "task"])
    model.set_requires_grad("language", requires_grad=False)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is None for _, parameter in parameters_of(model, "language"))
    parts = [tensors_of(model, name) for name in ("language", "task")]
    for tensors in parts[1].values():
        for tensor in tensors.values():
            tensor.requires_grad_()
    case.twin(*parts)(input_ids=IDS, labels=IDS).loss.backward()
    expected = {f"{path}.{name}": t.grad for path, tensors in parts[1].items() for name, t in tensors.items()}
    for name, parameter in parameters_of(model, "task"):
        close(parameter.grad, expected[name])
    assert all(p.grad is None for n, p in model.named_parameters() if ".bottleneck_adapters." not in n)


def disable(case: Case, folder: Path) -> None:
    model = case.model()
    own = logits(case.base())
    with model.disable_adapter():
        assert torch.equal(logits(model), own)
    close(logits(model), case.expected(tensors_of(model, "default")))


def delete(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    b = tensors_of(model, "b")
    model.delete_adapter("a")
    close(logits(model), case.expected(b))
    assert list(model.peft_config) == ["b"]
    assert not any(".a." in key for key in model.state_dict())
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("a")


def save_and_load(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    a, b = tensors_of(model, "a"), tensors_of(model, "b")
    model.save_pretrained(folder)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in (folder / "a").iterdir()}
    assert "import peft_sparse" in (folder / "a" / "README.md").read_text()
    size = (folder / "a" / "adapter_model.safetensors").stat().st_size
    assert size < 8 * sum(p.numel() for _, p in parameters_of(model, "a")) + 4000, "nothing but the adapter"
    for lean in (False, True):
        options = {"low_cpu_mem_usage": lean, "autocast_adapter_dtype": False}
        loaded = PeftModel.from_pretrained(case.base(), folder / "a", **options).eval()
        close(logits(loaded), case.expected(a))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        loaded.load_adapter(folder / "b", adapter_name="second", **options)
        close(logits(loaded), case.expected(a))
        loaded.set_adapter("second")
        close(logits(loaded), case.expected(b))
        untouched(loaded, case.base())
    loaded = PeftModel.from_pretrained(case.base(), folder / "a", is_trainable=True)
    assert all(parameter.requires_grad for _, parameter in parameters_of(loaded, "default"))


def merging_is_refused(case: Case, folder: Path) -> None:
    model = case.model()
    expected = logits(model)
    with pytest.raises(ValueError, match=r"cannot be merged: .* merge_and_unload\(\) gives a model"):
        model.merge_adapter()
    assert torch.equal(logits(model), expected)


def bake(case: Case, folder: Path) -> None:
    model = case.model("a", "b", "c")
    a, b = tensors_of(model, "a"), tensors_of(model, "b")
    baked = model.merge_and_unload(adapter_names=["b", "a"], safe_merge=True)
    assert type(baked) is type(case.base())
    assert not any(isinstance(module, BaseTunerLayer) for module in baked.modules())
    assert not hasattr(baked, "peft_config")
    expected = case.expected(b, a)
    close(logits(baked), expected)
    buffer = io.BytesIO()
    torch.save(baked, buffer)
    again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    close(logits(again), expected)
    other = case.model("a", "b")
    fill(other, "a", 7)
    fill(other, "b", 8)
    other = other.merge_and_unload(adapter_names=["b", "a"])
    assert (logits(other) - expected).abs().max() > 1e-3
    other.load_state_dict(baked.state_dict())
    close(logits(other), expected)
    close(logits(copy.deepcopy(baked)), expected)


def baking_the_active_one(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    model.set_adapter("b")
    b = tensors_of(model, "b")
    close(logits(model.merge_and_unload()), case.expected(b))


def safe_baking_refuses_nan(case: Case, folder: Path) -> None:
    model = case.model()
    parameters_of(model, "default")[0][1].data.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert parameters_of(model, "default")


def unload(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    plain = model.unload()
    assert type(plain) is type(case.base())
    untouched(plain, case.base())
    assert [name for name, _ in plain.named_modules()] == [name for name, _ in case.base().named_modules()]
    assert torch.equal(logits(plain), logits(case.base()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


def one_adapter_per_example(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    rows = [case.expected(tensors_of(model, "b")), logits(case.base()), case.expected(tensors_of(model, "a"))]
    found = logits(model, adapter_names=["b", "__base__", "a"])
    close(found, torch.stack([row[i] for i, row in enumerate(rows)]))
    with pytest.raises(ValueError, match="nobody"):
        logits(model, adapter_names=["nobody", "a", "a"])
    with pytest.raises(ValueError, match=r"one adapter per example \(3\), got 2"):
        logits(model, adapter_names=["a", "b"])
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="while adapters are disabled"):
        logits(model, adapter_names=["a", "b", "b"])
    model.base_model.enable_adapter_layers()
    close(logits(model), case.expected(tensors_of(model, "a")))


def inject(case: Case, folder: Path) -> None:
    source = case.model()
    expected = logits(source)
    for lean in (False, True):
        model = inject_adapter_in_model(case.config(), case.base(), low_cpu_mem_usage=lean)
        outcome = set_peft_model_state_dict(model, get_peft_model_state_dict(source), low_cpu_mem_usage=lean)
        assert not outcome.unexpected_keys
        for _, layer in iter_layers(model):
            layer.bottleneck_adapters.double()
        close(logits(model.eval()), expected)
        state = get_peft_model_state_dict(model)
        assert state.keys() == {key.removeprefix("base_model.model.") for key in get_peft_model_state_dict(source)}


def through_transformers(case: Case, folder: Path) -> None:
    source = case.model()
    source.save_pretrained(folder / "peft")
    model = case.base()
    model.load_adapter(folder / "peft", adapter_name="loaded")
    for _, layer in iter_layers(model):
        layer.bottleneck_adapters.double()
    close(logits(model), case.expected(tensors_of(source, "default")))
    model.add_adapter(case.config(), adapter_name="added")
    for _, layer in iter_layers(model):
        layer.bottleneck_adapters.double()
    fill(model, "added", 5)
    added = tensors_of(model, "added")
    close(logits(model), case.expected(added))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(case.base()))
    model.enable_adapters()
    model.set_adapter("added")
    model.save_pretrained(folder / "own")
    again = PeftModel.from_pretrained(case.base(), folder / "own", autocast_adapter_dtype=False)
    close(logits(again), case.expected(added))
    model.delete_adapter("loaded")
    close(logits(model), case.expected(added))


def status(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    whole = get_model_status(model)
    assert (whole.active_adapters, whole.enabled, whole.merged_adapters) == (["a"], True, [])
    assert whole.peft_types == {"a": "BOTTLENECK", "b": "BOTTLENECK"}
    assert whole.trainable_params == sum(p.numel() for _, p in parameters_of(model, "a"))
    assert len(get_layer_status(model)) == len(tensors_of(model, "a"))


def deep_copy(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    a, b = tensors_of(model, "a"), tensors_of(model, "b")
    twin = copy.deepcopy(model)
    fill(model, "a", 7)
    fill(model, "b", 8)
    close(logits(twin), case.expected(a))
    twin.set_adapter("b")
    close(logits(twin), case.expected(b))
    plain = twin.unload()
    assert torch.equal(logits(plain), logits(case.base()))
    close(logits(model), case.expected(tensors_of(model, "a")))


def pickled_config(case: Case, folder: Path) -> None:
    for config in (case.config(), case.model().peft_config["default"]):
        assert pickle.loads(pickle.dumps(config)) == config
        config.save_pretrained(folder)
        loaded = PeftConfig.from_pretrained(folder)
        assert type(loaded) is type(config)
        assert loaded.target_modules == config.target_modules


def gradient_checkpointing(case: Case, folder: Path) -> None:
    found = []
    for reentrant in (None, False, True):
        model = case.model().train()
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([parameter.grad.clone() for _, parameter in parameters_of(model, "default")])
    for plain, first, second in zip(*found, strict=True):
        assert plain.abs().sum() > 0
        close(first, plain)
        close(second, plain)


def generate(case: Case, folder: Path) -> None:
    if not case.is_decoder:
        return
    model = case.model()
    twin = case.twin(tensors_of(model, "default"))
    for options in ({}, {"num_beams": 3}):
        arguments = {"input_ids": IDS[:, :2], "max_new_tokens": 6, "do_sample": False, **options}
        assert torch.equal(model.generate(**arguments), twin.generate(**arguments))
        mixed = model.generate(**arguments, adapter_names=["default", "__base__", "default"])
        width = max(mixed.shape[1], 8)
        plain = case.base().generate(**arguments)
        pad = torch.nn.functional.pad
        rows = [pad(o, (0, width - o.shape[1]))[i] for i, o in enumerate([model.generate(**arguments), plain])]
        assert torch.equal(pad(mixed, (0, width - mixed.shape[1]))[:2], torch.stack(rows))


def train_save_resume(case: Case, folder: Path) -> None:
    model = case.model().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = tensors_of(model, "default")
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    after = tensors_of(model, "default")
    assert all(any(not torch.equal(before[p][n], after[p][n]) for n in before[p]) for p in before)
    untouched(model, case.base())
    model.save_pretrained(folder)
    fill(model, "default", 9)
    # What transformers' Trainer does to resume: load into the adapter that is there.
    model.load_adapter(folder, adapter_name="default", is_trainable=True)
    close(logits(model.eval()), case.expected(after))


def weighted(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    a, b = tensors_of(model, "a"), tensors_of(model, "b")
    model.base_model.add_weighted_adapter(["a", "b"], [1.5, 0.5], "mean")
    close(logits(model), case.expected(a))
    model.set_adapter("mean")
    # The factors are divided by their sum: 3/4 and 1/4. New adapters are float32 until somebody says otherwise.
    mean = {path: {name: 0.75 * a[path][name] + 0.25 * b[path][name] for name in a[path]} for path in a}
    torch.testing.assert_close(logits(model), case.expected(mean), rtol=1e-4, atol=1e-4)


def reference_for_dpo(case: Case, folder: Path) -> None:
    # What trl's DPOTrainer does: the same config object, then the values by the adapter's name in the parameter's.
    model = case.model()
    model.add_adapter("ref", model.peft_config["default"], autocast_adapter_dtype=False)
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    close(logits(model), case.expected(tensors_of(model, "default")))


def hidden_states(case: Case, folder: Path) -> None:
    base = case.base()
    # The first such call hooks what records the states into the model: before our hooks.
    base(input_ids=IDS, output_hidden_states=True)
    model = get_peft_model(base, case.config(), autocast_adapter_dtype=False).eval()
    fill(model, "default", 0)
    twin = case.twin(tensors_of(model, "default"))
    for one in (model, model.merge_and_unload()):
        found = one(input_ids=IDS, output_hidden_states=True).hidden_states
        expected = twin(input_ids=IDS, output_hidden_states=True).hidden_states
        assert len(found) == len(expected) == 3
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs)


VERBS: dict[str, Callable[[Case, Path], None]] = {
    "get_peft_model": get,
    "add_adapter, set_adapter": add_and_switch,
    "set_adapter of several": stack,
    "a frozen adapter beside one that trains": frozen_beside_training,
    "disable_adapter": disable,
    "delete_adapter": delete,
    "save_pretrained, from_pretrained, load_adapter": save_and_load,
    "merge_adapter": merging_is_refused,
    "merge_and_unload": bake,
    "merge_and_unload of the active one": baking_the_active_one,
    "safe_merge": safe_baking_refuses_nan,
    "unload": unload,
    "adapter_names": one_adapter_per_example,
    "inject_adapter_in_model": inject,
    "transformers' own verbs": through_transformers,
    "get_model_status, get_layer_status": status,
    "deepcopy": deep_copy,
    "pickle and save of the config": pickled_config,
    "gradient checkpointing": gradient_checkpointing,
    "generate": generate,
    "train, save, resume": train_save_resume,
    "add_weighted_adapter": weighted,
    "DPO's reference adapter": reference_for_dpo,
    "output_hidden_states": hidden_states,
}

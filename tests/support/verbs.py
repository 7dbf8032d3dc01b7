"""PEFT's verbs, each a function that tries it on a case of any adapter type. The table is at the end.

A case (`sparse.Case`, `bottleneck.Case`, `madg.MadGCase`) makes base models, configs and tuned models in float64. Its
`twin` is what tuned models are compared with: the base model that computes, from copies of what adapters hold
(`part`), what the papers' formulas say.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from peft.helpers import disable_input_dtype_casting
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.support import bottleneck, madg, sparse
from tests.support.exact import IDS, base_parameters, close, logits, untouched
from tests.support.replicas import OnReplicas

Case = sparse.Case | bottleneck.Case | madg.MadGCase
GREEDY = {"input_ids": IDS[:, :2], "max_new_tokens": 6, "do_sample": False}


def expected(case: Case, *parts: Any) -> Tensor:
    return logits(case.twin(*parts))


def through_bytes(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def assert_plain(model: nn.Module, base: nn.Module) -> None:
    """Nothing of an adapter is in the model: no layer, no name, no hook."""
    assert type(model) is type(base)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not hasattr(model, "peft_config")


def get(case: Case, folder: Path) -> None:
    base, config = case.base(), case.config(init_weights=True)
    request = copy.deepcopy(config)
    model = get_peft_model(case.base(), config).eval()
    assert type(model.base_model) is PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    if case.start:
        assert not torch.equal(logits(model), logits(base))
        torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=case.start)
    else:
        assert torch.equal(logits(model), logits(base)), "a fresh adapter is the identity, bit for bit"
    assert config == request, "the user's config is not changed"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(model.base_model.prefix in name and ".default" in name for name in trained)
    model = case.model()
    close(logits(model), expected(case, case.part(model)))
    assert not torch.equal(logits(model), logits(base))


def identity(case: Case, folder: Path) -> None:
    model = get_peft_model(case.base(), case.config(init_weights=True, init="identity")).eval()
    close(logits(model), logits(case.base()))


def add_and_switch(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    a, b = case.part(model, "a"), case.part(model, "b")
    close(logits(model), expected(case, a))
    model.set_adapter("b")
    close(logits(model), expected(case, b))
    model.set_adapter("a")
    close(logits(model), expected(case, a))
    untouched(model, case.base())


def several(case: Case, folder: Path) -> None:
    model = case.model("a", "b", "c")
    a, c = case.part(model, "a"), case.part(model, "c")
    model.base_model.set_adapter(["c", "a"])
    close(logits(model), expected(case, c, a))
    if isinstance(case, bottleneck.Case) and "parallel" not in case.request:
        assert (expected(case, c, a) - expected(case, a, c)).abs().max() > 1e-4, "the order matters"


def frozen_beside_training(case: Case, folder: Path) -> None:
    model = case.model("language", "task")
    model.base_model.set_adapter(["language", "task"])
    model.set_requires_grad("language", requires_grad=False)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is None for parameter in case.parameters(model, "language"))
    assert all(parameter.grad is None for parameter in base_parameters(model).values())
    for values, gradient in zip(case.parameters(model, "task"), case.gradients(model, "language", "task"), strict=True):
        rtol = {torch.bfloat16: 1e-2, torch.float32: 1e-5}.get(values.dtype, 1e-9)
        atol = 1e-9 if values.dtype is torch.float64 else 1e-6
        torch.testing.assert_close(values.grad.double(), gradient, rtol=rtol, atol=atol)


def disable(case: Case, folder: Path) -> None:
    model = case.model()
    wanted, own = expected(case, case.part(model)), logits(case.base())
    for merged in (False, True)[: 1 + case.is_mergeable]:
        if merged:
            model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits(model), own)
        close(logits(model), wanted)
    untouched(model, case.base())


def delete(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    b = case.part(model, "b")
    model.set_adapter("b")
    model.delete_adapter("a")
    close(logits(model), expected(case, b))
    assert list(model.peft_config) == ["b"]
    assert not any(".a." in key for key in model.state_dict())
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("a")
    model.add_adapter("a", case.config(), **case.exact)
    case.fill(model, "a", 5)
    model.set_adapter("a")
    close(logits(model), expected(case, case.part(model, "a")))
    model.delete_adapter("a")
    close(logits(model), expected(case, b))


def save_and_load(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    a, b = case.part(model, "a"), case.part(model, "b")
    logits(model)
    model.save_pretrained(folder)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in (folder / "a").iterdir()}
    assert "import peft_sparse" in (folder / "a" / "README.md").read_text()
    if not case.is_mergeable:
        size = (folder / "a" / "adapter_model.safetensors").stat().st_size
        assert size < 8 * sum(p.numel() for p in case.parameters(model, "a")) + 4000, "nothing but the adapter"
    for lean in (False, True):
        options = {"low_cpu_mem_usage": lean, **case.exact}
        loaded = PeftModel.from_pretrained(case.base(), folder / "a", **options).eval()
        close(logits(loaded), expected(case, a))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        loaded.load_adapter(folder / "b", adapter_name="second", **options)
        close(logits(loaded), expected(case, a))
        loaded.set_adapter("second")
        close(logits(loaded), expected(case, b))
        untouched(loaded, case.base())
    loaded = PeftModel.from_pretrained(case.base(), folder / "a", is_trainable=True)
    assert all(values.requires_grad for values in case.parameters(loaded))
    trainable = sum(p.numel() for p in loaded.parameters() if p.requires_grad)
    assert trainable == sum(values.numel() for values in case.parameters(loaded))


def merge_and_unmerge(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    a, b = case.part(model, "a"), case.part(model, "b")
    for names, parts in ((None, [a]), (["b"], [b]), (["a", "b"], [a, b])):
        model.merge_adapter(adapter_names=names, safe_merge=True)
        close(logits(model), expected(case, *parts))
        twin = dict(case.twin(*parts).named_parameters())
        for name, parameter in base_parameters(model).items():
            close(parameter, twin[name])
        model.unmerge_adapter()
        untouched(model, case.base())
        close(logits(model), expected(case, a))


def merge_one_after_the_other(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    model.merge_adapter(adapter_names=["a"])
    model.merge_adapter(adapter_names=["b"])
    close(logits(model), expected(case, case.part(model, "a"), case.part(model, "b")))
    model.unmerge_adapter()
    untouched(model, case.base())


def merging_is_refused(case: Case, folder: Path) -> None:
    model = case.model()
    with pytest.raises(ValueError, match=r"cannot be merged: .* merge_and_unload\(\) gives a model"):
        model.merge_adapter()
    close(logits(model), expected(case, case.part(model)))


def merge_and_unload(case: Case, folder: Path) -> None:
    for safe in (False, True):
        model = case.model("a", "b")
        a, b = case.part(model, "a"), case.part(model, "b")
        merged = model.merge_and_unload(safe_merge=safe, adapter_names=["a", "b"])
        assert_plain(merged, case.base())
        assert merged.state_dict().keys() == case.base().state_dict().keys()
        close(logits(merged), expected(case, a, b))
    merged.save_pretrained(folder)
    close(logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)), expected(case, a, b))


def bake(case: Case, folder: Path) -> None:
    model = case.model("a", "b", "c")
    wanted = expected(case, case.part(model, "b"), case.part(model, "a"))
    baked = model.merge_and_unload(adapter_names=["b", "a"], safe_merge=True)
    assert type(baked) is type(case.base())
    assert not any(isinstance(module, BaseTunerLayer) for module in baked.modules())
    assert not hasattr(baked, "peft_config")
    assert not any("generator" in name for name, _ in baked.named_parameters()), "a hypernetwork is gone"
    assert not baked._forward_hooks
    assert not baked._forward_pre_hooks
    close(logits(baked), wanted)
    close(logits(through_bytes(baked)), wanted)
    close(logits(copy.deepcopy(baked)), wanted)
    other = case.model("a", "b")
    case.fill(other, "a", 7)
    case.fill(other, "b", 8)
    other = other.merge_and_unload(adapter_names=["b", "a"])
    assert (logits(other) - wanted).abs().max() > 1e-3
    other.load_state_dict(baked.state_dict())
    close(logits(other), wanted)


def bake_the_active_one(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    model.set_adapter("b")
    b = case.part(model, "b")
    close(logits(model.merge_and_unload()), expected(case, b))


def safe_merge_refuses_nan(case: Case, folder: Path) -> None:
    model = case.model()
    case.parameters(model)[0].data.view(-1)[0] = torch.nan
    for merge in (model.merge_adapter, model.merge_and_unload)[0 if case.is_mergeable else 1 :]:
        with pytest.raises(ValueError, match="NaNs detected"):
            merge(safe_merge=True)
        untouched(model, case.base())
        assert case.parameters(model)


def unload(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    if case.is_mergeable:
        model.merge_adapter()
    plain = model.unload()
    assert_plain(plain, case.base())
    untouched(plain, case.base())
    assert torch.equal(logits(plain), logits(case.base()))


def one_adapter_per_example(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    a, b = case.part(model, "a"), case.part(model, "b")
    rows = (expected(case, b), logits(case.base()), expected(case, a))
    close(logits(model, adapter_names=["b", "__base__", "a"]), torch.stack([row[i] for i, row in enumerate(rows)]))
    with pytest.raises(ValueError, match="nobody"):
        logits(model, adapter_names=["nobody", "a", "a"])
    with pytest.raises(ValueError, match=r"one adapter per example \(3\), got 2"):
        logits(model, adapter_names=["a", "b"])
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="disabled"):
        logits(model, adapter_names=["a", "b", "b"])
    model.base_model.enable_adapter_layers()
    close(logits(model), expected(case, a))
    untouched(model, case.base())


def inject(case: Case, folder: Path) -> None:
    source = case.model()
    wanted = expected(case, case.part(source))
    for lean in (False, True):
        model = inject_adapter_in_model(case.config(), case.base(), low_cpu_mem_usage=lean)
        outcome = set_peft_model_state_dict(model, get_peft_model_state_dict(source), low_cpu_mem_usage=lean)
        assert not outcome.unexpected_keys
        close(logits(case.ready(model)), wanted)
        state = get_peft_model_state_dict(model)
        assert state.keys() == {key.removeprefix("base_model.model.") for key in get_peft_model_state_dict(source)}


def through_transformers(case: Case, folder: Path) -> None:
    source = case.model()
    first = case.part(source)
    source.save_pretrained(folder / "peft")
    model = case.base()
    model.load_adapter(folder / "peft", adapter_name="loaded")
    close(logits(case.ready(model)), expected(case, first))
    model.add_adapter(case.config(), adapter_name="added")
    case.ready(model)
    case.fill(model, "added", 5)
    added = case.part(model, "added")
    close(logits(model), expected(case, added))
    model.set_adapter("loaded")
    close(logits(model), expected(case, first))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(case.base()))
    model.enable_adapters()
    model.set_adapter("added")
    model.save_pretrained(folder / "own")
    assert (folder / "own" / "adapter_model.safetensors").exists()
    again = PeftModel.from_pretrained(case.base(), folder / "own", **case.exact)
    close(logits(again), expected(case, added))
    again = case.base()
    again.load_adapter(folder / "own")
    close(logits(case.ready(again)), expected(case, added))
    model.delete_adapter("loaded")
    close(logits(model), expected(case, added))


def auto(case: Case, folder: Path) -> None:
    case.base().save_pretrained(folder / "base")
    model = case.model()
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.float64)
    close(logits(case.ready(loaded)), expected(case, case.part(model)))
    assert type(PeftConfig.from_pretrained(folder / "adapter")) is type(case.config())
    native = AutoModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.float64)
    close(logits(case.ready(native)), logits(loaded))


def status(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    whole = get_model_status(model)
    assert (whole.active_adapters, whole.enabled, whole.merged_adapters) == (["a"], True, [])
    assert sorted(whole.available_adapters) == ["a", "b"]
    assert whole.peft_types == dict.fromkeys("ab", case.config().peft_type.value)
    assert whole.trainable_params == sum(values.numel() for values in case.parameters(model, "a"))
    # PEFT calls everything with the prefix in its name an adapter parameter.
    own = [p for name, p in model.named_parameters() if model.base_model.prefix in name]
    assert whole.total_params == sum(p.numel() for p in [*case.base().parameters(), *own])
    assert len(get_layer_status(model)) == case.num_layers(case.part(model, "a"))
    if case.is_mergeable:
        model.merge_adapter(adapter_names=["b"])
        assert get_model_status(model).merged_adapters == ["b"]


def uncast(case: Case, folder: Path) -> None:
    model = case.model("a")
    with disable_input_dtype_casting(model):
        close(logits(model), expected(case, case.part(model, "a")))


def data_parallel(case: Case, folder: Path) -> None:
    model = case.model("a")
    wanted = case.parameters(model, "a")
    plain = torch.autograd.grad(model(input_ids=IDS).logits.square().sum(), wanted)
    on_replicas = OnReplicas(model)(input_ids=IDS).logits
    close(on_replicas, expected(case, case.part(model, "a")))
    for found, whole in zip(torch.autograd.grad(on_replicas.square().sum(), wanted), plain, strict=True):
        # Values have a dtype of their own, to which the gradient of each half is rounded.
        off = 4 * torch.finfo(whole.dtype).eps * float(whole.abs().max())
        torch.testing.assert_close(found, whole, rtol=0, atol=off)


def reference_for_dpo(case: Case, folder: Path) -> None:
    # What trl's DPOTrainer does: the same config object, then the values by the adapter's name in the parameter's.
    model = case.model()
    model.add_adapter("ref", model.peft_config["default"], **case.exact)
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    close(logits(model), expected(case, case.part(model)))
    for values in case.parameters(model):
        values.data += 1
    close(logits(model), expected(case, case.part(model, "ref")))


def deep_copy(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    a, b = case.part(model, "a"), case.part(model, "b")
    for merged in (False, True)[: 1 + case.is_mergeable]:
        if merged:
            model.merge_adapter()
        twin = copy.deepcopy(model)
        for name in "ab":
            for values in case.parameters(model, name):
                values.data.mul_(-3)
        close(logits(twin), expected(case, a))
        if merged:
            twin.unmerge_adapter()
        untouched(twin, case.base())
        twin.set_adapter("b")
        close(logits(twin), expected(case, b))
        assert torch.equal(logits(twin.unload()), logits(case.base()))
        case.fill(model, "a", 0)
        case.fill(model, "b", 1)
        close(logits(model), expected(case, a))


def pickled(case: Case, folder: Path) -> None:
    model = case.model()
    for config in (case.config(), model.peft_config["default"]):
        assert pickle.loads(pickle.dumps(config)) == config
        config.save_pretrained(folder)
        loaded = PeftConfig.from_pretrained(folder)
        assert type(loaded) is type(config)
        assert loaded.target_modules == config.target_modules
    close(logits(through_bytes(model)), expected(case, case.part(model)))


def gradient_checkpointing(case: Case, folder: Path) -> None:
    found = []
    for reentrant in (None, False, True):
        model = case.model().train()
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append([values.grad.clone() for values in case.parameters(model)])
    for plain, first, second in zip(*found, strict=True):
        assert plain.abs().sum() > 0
        rtol = 1e-9 if plain.dtype is torch.float64 else 1e-6
        torch.testing.assert_close(first, plain, rtol=rtol, atol=1e-9)
        torch.testing.assert_close(second, plain, rtol=rtol, atol=1e-9)


def generate(case: Case, folder: Path) -> None:
    model = case.model()
    twin = case.twin(case.part(model))
    for options in ({}, {"num_beams": 3}):
        assert torch.equal(model.generate(**GREEDY, **options), twin.generate(**GREEDY, **options))


def generate_per_example(case: Case, folder: Path) -> None:
    model = case.model()

    def padded(ids: Tensor) -> Tensor:
        return nn.functional.pad(ids, (0, 8 - ids.shape[1]))

    for options in ({}, {"num_beams": 3}):
        mixed = model.generate(**GREEDY, **options, adapter_names=["default", "__base__", "default"])
        rows = [model.generate(**GREEDY, **options), case.base().generate(**GREEDY, **options)]
        assert torch.equal(padded(mixed)[:2], torch.stack([padded(row)[i] for i, row in enumerate(rows)]))


def train_save_resume(case: Case, folder: Path) -> None:
    model = case.model().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = [values.detach().clone() for values in case.parameters(model)]
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, case.parameters(model), strict=True)]
    assert all(changed) or (case.is_mergeable and any(changed)), "a sparse support may lie where no gradient is"
    after = case.part(model)
    untouched(model, case.base())
    model.save_pretrained(folder)
    case.fill(model, "default", 9)
    # What transformers' Trainer does to resume: load into the adapter that is there.
    model.load_adapter(folder, adapter_name="default", is_trainable=True)
    close(logits(model.eval()), expected(case, after))


def weighted(case: Case, folder: Path) -> None:
    model = case.model("a", "b")
    a, b = case.part(model, "a"), case.part(model, "b")
    model.base_model.add_weighted_adapter(["a", "b"], [1.5, 0.5], "mean")
    close(logits(model), expected(case, a))
    model.set_adapter("mean")
    # The factors are divided by their sum: 3/4 and 1/4. New adapters are float32 until somebody says otherwise.
    mean = {path: {name: 0.75 * a[path][name] + 0.25 * b[path][name] for name in a[path]} for path in a}
    torch.testing.assert_close(logits(model), expected(case, mean), rtol=1e-4, atol=1e-4)


def hidden_states(case: Case, folder: Path) -> None:
    base = case.base()
    # The first such call hooks what records the states into the model: before our hooks.
    base(input_ids=IDS, output_hidden_states=True)
    model = get_peft_model(base, case.config(), **case.exact).eval()
    case.fill(model, "default", 0)
    twin = case.twin(case.part(model))
    for one in (model, model.merge_and_unload()):
        found = one(input_ids=IDS, output_hidden_states=True).hidden_states
        wanted = twin(input_ids=IDS, output_hidden_states=True).hidden_states
        assert len(found) == len(wanted) == 3
        for ours, theirs in zip(found, wanted, strict=True):
            close(ours, theirs)


VERBS: dict[str, Callable[[Case, Path], None]] = {
    "get_peft_model": get,
    "add_adapter, set_adapter": add_and_switch,
    "set_adapter of several": several,
    "a frozen adapter beside one that trains": frozen_beside_training,
    "disable_adapter": disable,
    "delete_adapter": delete,
    "save_pretrained, from_pretrained, load_adapter": save_and_load,
    "safe_merge": safe_merge_refuses_nan,
    "unload": unload,
    "adapter_names": one_adapter_per_example,
    "inject_adapter_in_model": inject,
    "transformers' own verbs": through_transformers,
    "get_model_status, get_layer_status": status,
    "disable_input_dtype_casting": uncast,
    "nn.DataParallel": data_parallel,
    "DPO's reference adapter": reference_for_dpo,
    "deepcopy": deep_copy,
    "pickle, torch.save": pickled,
    "gradient checkpointing": gradient_checkpointing,
    "train, save, resume": train_save_resume,
}
OF_DECODERS = {"AutoPeftModel": auto, "generate": generate}
OF_MERGEABLE = {
    "merge_adapter, unmerge_adapter": merge_and_unmerge,
    "merge_adapter one after the other": merge_one_after_the_other,
    "merge_and_unload": merge_and_unload,
}
OF_GENERATING = {
    "merge_adapter": merging_is_refused,
    "merge_and_unload": bake,
    "merge_and_unload of the active one": bake_the_active_one,
    "output_hidden_states": hidden_states,
}
OF_BOTTLENECK = {"identity": identity, "add_weighted_adapter": weighted}


def verbs_of(case: Case) -> dict[str, Callable[[Case, Path], None]]:
    """The rows of the table that a case has: what it cannot do is refused in one of them."""
    found = {**VERBS, **(OF_MERGEABLE if case.is_mergeable else OF_GENERATING)}
    if case.is_decoder:
        found |= OF_DECODERS
    if isinstance(case, bottleneck.Case):
        found |= OF_BOTTLENECK
        if case.is_decoder:
            found["generate with adapter_names"] = generate_per_example
    return found

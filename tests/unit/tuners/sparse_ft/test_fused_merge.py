"""Merging into all layers in one pass beside the way by layers: the same bits, and the same refusals."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from peft import PeftModel
from torch import nn

from peft_sparse import ConfigError, RandConfig, iter_deltas, resident
from peft_sparse.core.backends import native
from tests.support.adapters import adapted
from tests.support.models import IDS, bert, gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore")
needs_kernels = pytest.mark.skipif(native._compiler() is None, reason="no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def passes(monkeypatch):
    """How many weights each pass of the kernels was over."""
    if native.compiled() is None:
        pytest.skip("no C++ compiler")
    seen = []
    write = native.Kernels.keep_and_write_
    monkeypatch.setattr(
        native.Kernels, "keep_and_write_", lambda self, pieces: seen.append(len(pieces)) or write(self, pieces)
    )
    return seen


def bits(model: nn.Module) -> dict[str, bytes]:
    return {
        name: parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for name, parameter in model.named_parameters()
        if "sparse_ft_" not in name
    }


def hooks(model: nn.Module) -> int:
    return sum(len(m._state_dict_pre_hooks) + len(m._load_state_dict_pre_hooks) for m in model.modules())


def switches(model: PeftModel) -> list[dict[str, bytes]]:
    """The base parameters after each step of adapters that take turns."""
    found = [bits(model)]
    for names in ("a", "b", ["a", "b"], ["b", "a"], "a"):
        model.set_adapter(names)
        model.merge_adapter()
        found.append(bits(model))
        model.unmerge_adapter()
        found.append(bits(model))
    model.merge_adapter(adapter_names=["b"], safe_merge=True)
    model.merge_adapter(adapter_names=["a"])
    found.append(bits(model))
    model.set_adapter("b")
    return [*found, bits(model)]


MODELS = {
    "llama": (llama, {}),
    "biases": (bert, {"target_biases": True}),
    "conv1d": (gpt2, {}),
    "all, tied": (gpt2, {"target_modules": "all"}),
    "float64 values": (llama, {"values_dtype": "float64"}),
    "bfloat16 values": (llama, {"values_dtype": "bfloat16"}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_the_bits_are_those_of_the_way_by_layers(monkeypatch, passes, kind, dtype):
    make, fields = MODELS[kind]
    model = adapted("SPARSE_FT", make().to(dtype), "a", "b", **fields)
    found = switches(model)
    is_plain = kind in ("llama", "conv1d", "bfloat16 values") and dtype is not torch.float16
    assert (len(passes) == 6) if is_plain else (kind == "all, tied" or not passes)
    monkeypatch.setattr(native, "_found", [None])
    slowly = switches(model)
    assert found == slowly
    assert all(found[i] == found[0] != found[i - 1] for i in (2, 4, 6, 8, 10, 12))
    assert found[11] != found[0]


def last_value(model: PeftModel, name: str = "a") -> torch.Tensor:
    return list(iter_deltas(model, name))[-1][-1].values.data


@pytest.mark.parametrize("by_kernels", [True, False])
def test_a_refusal_leaves_every_bit(monkeypatch, by_kernels):
    if not by_kernels:
        monkeypatch.setattr(native, "_found", [None])
    model = adapted("SPARSE_FT", llama(), "a", "b")
    before = bits(model)
    own = list(iter_deltas(model, "a"))[-1]
    with torch.no_grad():
        own[1].get_base_layer().weight.view(-1)[own[-1].indices[0]] = 3e38
    last_value(model)[0] = 3e38
    before = bits(model)
    for safe_merge, error in ((False, ConfigError), (True, ValueError)):
        with pytest.raises(error, match=r"The base model is unchanged"):
            model.merge_adapter(safe_merge=safe_merge)
        assert bits(model) == before
        assert not any(
            getattr(module, "merged", False) or getattr(module, "_written", {}) for module in model.modules()
        )
    model.set_adapter("b")
    model.merge_adapter()
    model.unmerge_adapter()
    assert bits(model) == before


@pytest.mark.parametrize("by_kernels", [True, False])
def test_a_nan_is_merged_as_peft_merges_it_and_refused_by_safe_merge(monkeypatch, by_kernels):
    if not by_kernels:
        monkeypatch.setattr(native, "_found", [None])
    model = adapted("SPARSE_FT", llama(), "a")
    before = bits(model)
    last_value(model)[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert bits(model) == before
    model.merge_adapter()
    own = [parameter for name, parameter in model.named_parameters() if "sparse_ft_" not in name]
    assert sum(int(parameter.isnan().sum()) for parameter in own) == 1
    model.unmerge_adapter()
    assert bits(model) == before


def test_layers_of_one_memory_are_merged_one_by_one(monkeypatch, passes):
    def outcome():
        model = adapted("SPARSE_FT", llama(), "a", "b")
        layers = [layer.get_base_layer() for _, layer, _, _ in iter_deltas(model, "a")]
        same = [layer for layer in layers if layer.weight.shape == layers[0].weight.shape]
        same[1].weight.data = same[0].weight.data
        before = bits(model)
        model.merge_adapter()
        merged = bits(model)
        model.unmerge_adapter()
        assert bits(model) == before != merged
        return merged

    found = outcome()
    assert not passes
    monkeypatch.setattr(native, "_found", [None])
    assert found == outcome()


def test_what_changes_between_switches_is_seen(passes):
    model = adapted("SPARSE_FT", llama(), "a", "b")
    model.merge_adapter()
    model.unmerge_adapter()
    before = bits(model)

    # Values, supports, weights and layers, by ways that leave no trace.
    (_, layer, _, delta), *_ = iter_deltas(model, "a")
    base = layer.get_base_layer()
    delta.values.data[0] += 1
    base.weight.data = base.weight.data.clone().fill_(0.5)
    model.merge_adapter()
    wanted = torch.full_like(base.weight, 0.5).view(-1)
    wanted[delta.indices.long()] += delta.values.detach()
    assert torch.equal(base.weight.view(-1), wanted)
    model.unmerge_adapter()
    assert torch.equal(base.weight, torch.full_like(base.weight, 0.5))

    delta.set_support(delta.indices[1:].clone(), delta.values.detach()[1:].clone())
    model.merge_adapter()
    assert int((base.weight != 0.5).sum()) == delta.count
    model.unmerge_adapter()

    inner = model.base_model.model.model
    inner.layers[1] = nn.Identity()
    model.merge_adapter()
    assert passes[-1] < passes[0]
    model.unmerge_adapter()
    kept = {name: value for name, value in bits(model).items() if ".layers.0." in name and "q_proj" not in name}
    assert all(before[name] == value for name, value in kept.items())


@needs_kernels
def test_a_weight_cast_or_exchanged_while_merged_is_put_back_as_by_layers(monkeypatch):
    def outcome(change):
        model = adapted("SPARSE_FT", llama(), "a")
        model.merge_adapter()
        change(model)
        model.unmerge_adapter()
        return bits(model)

    def exchange(model):
        for _, layer, _, _ in iter_deltas(model, "a"):
            base = layer.get_base_layer()
            base.weight = nn.Parameter(base.weight.detach().clone() + 1)

    def shrink(model):
        base = next(iter_deltas(model, "a"))[1].get_base_layer()
        base.weight.data = torch.zeros(2, 2)

    def pointed(model):
        for _, layer, _, _ in iter_deltas(model, "a"):
            base = layer.get_base_layer()
            base.weight.data = base.weight.data + 1

    for change in (lambda model: model.double(), lambda model: model.bfloat16(), exchange, shrink, pointed):
        with monkeypatch.context() as patch:
            fast = outcome(change)
            patch.setattr(native, "_found", [None])
            assert fast == outcome(change)


def test_copies_and_pickles_of_a_model_that_has_switched(passes):
    model = adapted("SPARSE_FT", llama(), "a", "b")
    before = bits(model)
    model.merge_adapter()
    model.unmerge_adapter()
    model.merge_adapter()
    for twin in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert bits(twin) == bits(model) != before
        twin.unmerge_adapter()
        assert bits(twin) == before
        twin.set_adapter("b")
        twin.merge_adapter()
        own = {id(layer) for layer in model.modules()}
        assert not own & {id(layer) for layer in twin.base_model.tuned_layers()}
    assert bits(model) != before
    model.unmerge_adapter()
    assert bits(model) == before


@pytest.mark.parametrize("kind", ["SPARSE_FT", "ADA_SFT"])
@pytest.mark.parametrize("leave", [lambda m: m.unload(), lambda m: m.merge_and_unload()], ids=["unload", "merge"])
def test_nothing_of_ours_stays_on_a_model_that_is_unloaded(kind, leave):
    base = llama()
    before = hooks(base)
    model = adapted(kind, base, "a")
    model.merge_adapter()
    model.unmerge_adapter()
    assert hooks(leave(model)) == before


@pytest.mark.parametrize("by_kernels", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_resident_adapters_take_turns(monkeypatch, by_kernels, dtype):
    if not by_kernels:
        monkeypatch.setattr(native, "_found", [None])
    elif native.compiled() is None:
        pytest.skip("no C++ compiler")
    model = adapted("SPARSE_FT", llama().to(dtype), "a", "b").requires_grad_(False)
    before, merged = bits(model), {}
    for names in ("a", "b", ["a", "b"]):
        model.set_adapter(names)
        model.merge_adapter()
        merged[str(names)] = bits(model)
        model.unmerge_adapter()
    with resident(model), torch.no_grad():
        for names in ("a", "b", ["a", "b"], "a", ["a", "b"], "b"):
            model.set_adapter(names)
            model(input_ids=IDS)
            assert bits(model) == merged[str(names)]
            if names == "b":
                held = model.state_dict()
                tensors = {name: tensor for name, tensor in held.items() if "base_layer.weight" in name}
                assert all(
                    before[name] == tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()
                )
    assert all(before[name] == tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items())
    assert bits(model) == before


@pytest.mark.parametrize("kind", ["SPARSE_FT", "ADA_SFT"])
def test_activating_adapters_unmerges_also_where_several_have_heads(kind):
    model = adapted(kind, llama(), "a", "b", modules_to_save=["lm_head"], target_modules=["q_proj"])
    before = {name: value for name, value in bits(model).items() if "q_proj.base_layer" in name}
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.base_model.set_adapter(["a", "b"])
    after = {name: value for name, value in bits(model).items() if "q_proj.base_layer" in name}
    assert after == before
    assert all(layer.active_adapters == ["a", "b"] for layer in model.base_model.tuned_layers())


def test_an_adapter_on_other_layers_is_found_after_a_switch(passes):
    model = adapted("SPARSE_FT", llama(), "a", target_modules=["q_proj"])
    model.merge_adapter()
    model.unmerge_adapter()
    model.add_adapter("b", RandConfig(density=0.2, target_modules=["q_proj", "up_proj"], init_weights=False))
    model.set_adapter("b")
    model.merge_adapter()
    assert passes == [2, 4]
    model.unmerge_adapter()


def test_a_parameter_that_a_library_replaced_is_left_to_it():
    model = adapted("SPARSE_FT", llama(), "a", "b")
    first, *others = [delta for *_, delta in iter_deltas(model, "b")]
    replaced = first._parameters.pop("values").detach()  # as FSDP1 does with flattened parameters
    first.__dict__["values"] = replaced
    model.set_adapter("b")
    assert not replaced.requires_grad
    assert others
    assert all(delta.values.requires_grad for delta in others)

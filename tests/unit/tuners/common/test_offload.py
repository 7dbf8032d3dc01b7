"""Models whose weights accelerate keeps elsewhere between the forwards of their modules."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from peft import PeftModel

from tests.support.models import IDS, llama, logits, tuned

KINDS = ["sparse", "all", "ada", "bottleneck"]


def offload(model, how, tmp_path):
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk":
        accelerate.disk_offload(model, str(tmp_path / "offload"), execution_device="cpu")
    else:
        device_map = {name: "cpu" if i % 2 else "disk" for i, (name, _) in enumerate(model.named_children())}
        accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    return model


def is_offloaded(model):
    return any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_outputs_are_those_of_the_whole_model(kind, how, order, tmp_path):
    want = logits(tuned(kind))
    model = tuned(kind, offload(llama(), how, tmp_path)) if order == "before" else offload(tuned(kind), how, tmp_path)
    assert is_offloaded(model)
    assert torch.equal(logits(model), want)
    assert torch.equal(logits(model), want)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    assert is_offloaded(model)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trains_on_an_offloaded_model(kind, tmp_path):
    plain, model = tuned(kind), offload(tuned(kind), "cpu", tmp_path)
    for each in (plain, model):
        each(input_ids=IDS, labels=IDS).loss.backward()
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    found = [(a.grad, b.grad) for a, b in pairs if a.grad is not None]
    assert found
    assert all(torch.equal(a, b) for a, b in found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_the_adapter(kind, tmp_path):
    model = offload(tuned(kind), "cpu", tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(tuned(kind)))
    again = PeftModel.from_pretrained(offload(llama(), "cpu", tmp_path), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(tuned(kind)))


@pytest.mark.parametrize("kind", ["sparse", "all", "ada"])
@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_merging(kind, how, tmp_path):
    want, plain = logits(tuned(kind)), logits(llama())
    model = offload(tuned(kind), how, tmp_path)
    model.merge_adapter(safe_merge=True)
    assert is_offloaded(model)
    assert torch.equal(logits(model), want)
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), want)
    assert torch.equal(logits(model.merge_and_unload()), want)


@pytest.mark.parametrize("kind", KINDS)
def test_unloading(kind, tmp_path):
    model = offload(tuned(kind), "cpu", tmp_path)
    logits(model)
    assert torch.equal(logits(model.unload()), logits(llama()))


def test_resident_leaves_offloaded_weights_alone(tmp_path):
    from peft_sparse import resident

    model = offload(tuned(), "cpu", tmp_path)
    want = logits(tuned())
    with resident(model):
        assert torch.equal(logits(model), want)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


def test_hooks_that_are_removed_leave_the_adapter(tmp_path):
    model = offload(tuned("all"), "cpu", tmp_path)
    want = logits(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert not is_offloaded(model)
    assert torch.equal(logits(model), want)
    assert torch.equal(logits(copy.deepcopy(model)), want)


def test_a_weight_that_the_model_reads_is_loaded(tmp_path):
    plain, model = tuned("all"), offload(tuned("all"), "cpu", tmp_path)
    layers = [each.base_model.model.model.layers[0].self_attn.q_proj for each in (plain, model)]
    assert layers[1].weight.device == torch.device("cpu")
    assert layers[1].get_base_layer().weight.is_meta
    grads = []
    for layer in layers:
        (torch.ones(1, 16) @ layer.weight.t()).square().sum().backward()
        grads.append(layer.sparse_ft_weight["default"].values.grad)
    assert torch.equal(*grads)
    assert bool((grads[0] != 0).any())

"""A tuned layer is to the model what its base layer is: weights that are read past its forward, attributes, methods,
hooks, and forwards that were replaced.
"""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

from peft_sparse import AdaSftConfig, BottleneckConfig, ConfigError, RandConfig, resident
from tests.support.models import SPARSE, llama, logits, tuned


class Reader(nn.Module):
    """Reads the weights of its layers instead of calling them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.conv = nn.Linear(6, 8), nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.emb, self.norm = nn.Embedding(5, 6), nn.LayerNorm(8)

    def forward(self, ids):
        x = F.embedding(ids, self.emb.weight.to(self.lin.weight.dtype))
        x = x @ self.lin.weight.t() + self.lin.bias
        x = F.conv1d(x.mT, self.conv.weight, self.conv.bias, self.conv.stride, self.conv.padding, groups=8).mT
        return F.layer_norm(x, self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps)


SOME = torch.tensor([[1, 2, 4], [0, 3, 3]])


def values(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", ["all", "ada"])
@pytest.mark.parametrize("is_resident", [False, True])
def test_who_reads_a_weight_sees_the_adapter_and_its_gradient(kind, is_resident):
    model = tuned(kind, Reader())
    block = resident(model) if is_resident else torch.enable_grad()
    with block:
        output = model(SOME)
        output.square().sum().backward()
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(output, merged(SOME))
    assert not torch.allclose(output, Reader()(SOME))
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in values(model))


def test_gradients_are_the_entries_of_the_dense_one():
    model = tuned("all", Reader())
    merged = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    model(SOME).square().sum().backward()
    merged(SOME).square().sum().backward()
    for name, layer in [("lin", model.base_model.model.lin), ("conv", model.base_model.model.conv)]:
        delta = layer.sparse_ft_weight["default"]
        dense = getattr(merged, name).weight.grad.flatten()[delta.indices.long()]
        assert torch.allclose(delta.values.grad, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["all", "ada"])
def test_the_weight_follows_the_verbs(kind):
    model = tuned(kind, Reader())
    layer, own = model.base_model.model.lin, Reader().lin.weight
    effective = copy.deepcopy(model).merge_and_unload().lin.weight
    assert torch.equal(layer.weight, effective)
    assert layer.weight.dtype == own.dtype
    with model.disable_adapter():
        assert torch.equal(layer.weight, own)
    model.merge_adapter()
    assert torch.equal(layer.weight, effective)
    assert isinstance(layer.weight, nn.Parameter)
    with model.disable_adapter():
        assert torch.equal(layer.weight, own)
    model.unmerge_adapter() if layer.merged else None
    model.add_adapter(
        "idle",
        RandConfig(density=0.1, target_modules=["conv"]) if kind == "all" else AdaSftConfig(target_modules=["lin"]),
    )
    if kind == "all":
        model.set_adapter("idle")
        assert layer.weight is layer.get_base_layer().weight


def test_what_is_written_into_a_read_weight_is_refused():
    layer = tuned("all", Reader()).base_model.model.lin
    with torch.no_grad(), pytest.raises(ConfigError, match=r"get_base_layer\(\)\.weight"):
        layer.weight.mul_(2)


def test_names_lead_to_the_base_layers_parameters():
    model = tuned("all", llama(tie_word_embeddings=True))
    base = model.get_base_model()
    own = base.model.embed_tokens.get_base_layer().weight
    assert base.get_parameter("model.embed_tokens.weight") is own
    base.tie_weights()
    assert base.lm_head.weight is own


def test_several_adapters_in_a_batch_cannot_share_a_read_weight():
    model = tuned("all", Reader())
    model.add_adapter("other", RandConfig(**SPARSE, target_modules="all", seed=7))
    model.eval()
    with pytest.raises(ConfigError, match="reads the weight of a Embedding itself"):
        model(SOME, adapter_names=["default", "other"])
    assert torch.equal(model(SOME, adapter_names=["default"] * 2), model(SOME))
    with model.disable_adapter():
        plain = model(SOME)
    assert torch.equal(model(SOME, adapter_names=["__base__"] * 2), plain)


# ---- attributes and methods ----------------------------------------------------------------------


def test_attributes_are_the_base_layers():
    layer, base = tuned("all", Reader()).base_model.model.conv, Reader().conv
    for name in ("stride", "padding", "kernel_size", "groups", "in_channels", "padding_mode"):
        assert getattr(layer, name) == getattr(base, name)
    assert layer._reversed_padding_repeated_twice == base._reversed_padding_repeated_twice
    with pytest.raises(AttributeError, match="'Conv' object has no attribute 'absent'"):
        _ = layer.absent
    assert not hasattr(layer, "_hf_hook")


def test_a_method_of_the_base_layer_computes_with_the_adapter():
    layer = tuned("all", Reader()).base_model.model.conv
    x = torch.randn(1, 8, 4)
    assert torch.equal(layer._conv_forward(x, layer.weight, layer.bias), layer(x))
    table = PositionTable(8, 4)
    tuned_table = tuned("all", nn.Sequential(table)).base_model.model[0]
    found = tuned_table.lookup(torch.arange(3))
    assert torch.equal(found, tuned_table(torch.arange(3)))
    assert not torch.equal(found, PositionTable(8, 4).lookup(torch.arange(3)))
    found.sum().backward()
    assert bool((tuned_table.sparse_ft_weight["default"].values.grad != 0).any())


class PositionTable(nn.Embedding):
    def __init__(self, *sizes):
        torch.manual_seed(0)
        super().__init__(*sizes)

    def lookup(self, ids):
        return super().forward(ids + 1)

    def forward(self, ids):
        return self.lookup(ids)


def test_a_setting_is_set_where_it_acts():
    model = tuned("all", Reader())
    norm = model.base_model.model.norm
    norm.eps = 10.0
    x = torch.randn(2, 8)
    assert norm.get_base_layer().eps == 10.0
    assert torch.equal(norm(x), F.layer_norm(x, (8,), norm.weight, norm.bias, 10.0))


def test_methods_that_would_go_past_a_bottleneck_are_refused():
    model = get_peft_model(llama(), BottleneckConfig(bottleneck_size=4))
    layer = next(m for m in model.modules() if hasattr(m, "bottleneck_adapters"))
    assert layer.hidden_size == 16
    layer.base_layer._forward_past = lambda x: x
    type(layer.base_layer).forward_past = lambda self, x: x
    try:
        with pytest.raises(ConfigError, match=r"forward_past\(\) of a .* computes past the bottleneck adapters"):
            layer.forward_past(1)
    finally:
        del type(layer.base_layer).forward_past


# ---- hooks and replaced forwards -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["all", "ada"])
def test_hooks_on_the_base_layers_see_and_change_what_the_adapter_computes(kind):
    def scaled(record, module, args, output):
        record.append(module)
        return output * 2

    def hooked(record):
        base = llama()
        for module in base.modules():
            if not list(module.children()) and list(module.parameters(recurse=False)):
                module.register_forward_hook(partial(scaled, record))
        return base

    record: list[nn.Module] = []
    model = tuned(kind, hooked(record))
    found = logits(model)
    assert {id(m) for m in record} <= {id(m) for m in model.modules()}
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(found, logits(merged))
    assert not torch.allclose(found, logits(tuned(kind)))


def double(self, x):
    return F.linear(x, self.weight, self.bias) * 2


def test_a_method_that_was_given_to_a_module_computes_with_the_adapter():
    base = nn.Sequential(nn.Linear(4, 4))
    base[0].forward = MethodType(double, base[0])
    model = get_peft_model(base, RandConfig(**SPARSE, target_modules=["0"]))
    x = torch.randn(3, 4)
    found = model(x)
    assert not torch.equal(found, base[0].get_base_layer()(x))
    assert torch.equal(found, model.merge_and_unload()(x))


@pytest.mark.parametrize("config", [RandConfig(**SPARSE, target_modules=["0"]), AdaSftConfig(target_modules=["0"])])
def test_a_function_that_was_given_to_a_module_is_refused(config):
    base = nn.Sequential(nn.Linear(4, 4))
    own = base[0]
    base[0].forward = lambda x: F.linear(x, own.weight) * 2
    with pytest.raises(ConfigError, match=r"the forward of 0 \(Linear\) was replaced"):
        get_peft_model(base, config)


def test_gradients_under_checkpointing_of_a_reader():
    model = tuned("all", Reader())
    torch.utils.checkpoint.checkpoint(model, SOME, use_reentrant=False).square().sum().backward()
    found = [p.grad.clone() for p in values(model)]
    model.zero_grad()
    model(SOME).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, values(model), strict=True))
    assert len(found) == 7

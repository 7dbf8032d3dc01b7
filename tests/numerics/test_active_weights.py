"""Forwards that record no gradient: the fast way of linear layers beside the plain one, and what it must notice."""

from __future__ import annotations

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.func import functional_call, jvp, vmap
from transformers.pytorch_utils import Conv1D

from peft_sparse import RandConfig, iter_deltas, resident
from peft_sparse.core.backends import native, reference
from peft_sparse.tuners.sparse_ft.layers import linear as linear_layers
from tests.support.oracle import relative_error

pytestmark = pytest.mark.usefixtures("way")
NAMES = ["one", "two", "three"]
LAYERS = {"linear": lambda: nn.Linear(160, 130), "conv1d": lambda: Conv1D(130, 160)}


@pytest.fixture(params=["kernels", "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "_found", [None])
    elif native.compiled() is None:
        pytest.skip("no C++ compiler")


def tuned(*names, make=LAYERS["linear"], dtype=torch.float32):
    torch.manual_seed(0)
    configs = [
        RandConfig(density=0.01, target_modules=["0"], init_weights=False, seed=seed) for seed in range(len(names))
    ]
    model = get_peft_model(nn.Sequential(make()).to(dtype), configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    return model.eval().requires_grad_(False)


def layer_of(model):
    return model.base_model.model[0]


def exact(model, name, x):
    """What an adapter makes of inputs, in float64 from the weight as it is stored."""
    layer = layer_of(model)
    base, weight = layer.get_base_layer(), layer.get_base_layer().weight.detach()
    if name != "__base__":
        delta = layer.sparse_ft_weight[name]
        weight = reference.tuned_weight(weight, [(delta.values.detach(), delta.indices)])
    weight = weight.double() if isinstance(base, Conv1D) else weight.double().t()
    return x.double() @ weight + base.bias.double()


@torch.no_grad()
@pytest.mark.parametrize("shape", [(160,), (3, 160), (9, 160)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_mixed_batch_against_float64(kind, dtype, shape):
    model = tuned(*NAMES, make=LAYERS[kind], dtype=dtype)
    names = ["two", "__base__", "one", "one", "three", "one", "two"]
    x = torch.randn(len(names), *shape).to(dtype)
    expected = torch.stack([exact(model, name, row) for name, row in zip(names, x, strict=True)])
    one_by_one = []
    for name, row in zip(names, x, strict=True):
        if name == "__base__":
            one_by_one.append(layer_of(model).get_base_layer()(row[None]))
        else:
            model.base_model.set_adapter(name)
            one_by_one.append(model(row[None]))
    found = layer_of(model)(x, adapter_names=names)
    # A library of products adds up in another order where there are more rows.
    of_base = relative_error(layer_of(model).get_base_layer()(x), exact(model, "__base__", x))
    assert relative_error(found, expected) <= 2 * max(of_base, relative_error(torch.cat(one_by_one), expected))


@torch.no_grad()
def test_a_mixed_batch_sees_what_changes_between_calls():
    model, x, names = tuned(*NAMES), torch.randn(3, 160), ["three", "one", "two"]
    layer = layer_of(model)

    def is_right():
        expected = torch.stack([exact(model, name, row) for name, row in zip(names, x, strict=True)])
        return relative_error(layer(x, adapter_names=names), expected) < 1e-6

    assert is_right()
    delta = layer.sparse_ft_weight["one"]
    delta.values.data.add_(1)
    assert is_right()
    delta.set_support(delta.indices + 1, delta.values.data * 2)
    assert is_right()
    delta.values.data = delta.values.data.bfloat16()
    assert is_right()
    layer.get_base_layer().weight.data = layer.get_base_layer().weight.data + 1
    assert is_right()
    with resident(model):
        model(x)
        assert relative_error(layer(x, adapter_names=["one"] * 3), layer(x)) < 1e-6
    assert is_right()
    model.delete_adapter("one")
    model.add_adapter("one", RandConfig(density=0.02, target_modules=["0"], init_weights=False, seed=9))
    assert is_right()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["resident", "merged"])
def test_what_stands_around_the_base_layer_goes_on_running(mode):
    model, x, seen = tuned("one"), torch.randn(1, 160), []
    base = layer_of(model).get_base_layer()
    expected = model(x)
    with resident(model):
        if mode == "merged":
            model.merge_adapter()

        def output(count):
            seen.clear()
            torch.testing.assert_close(model(x), expected)
            assert len(seen) == count

        output(0)
        for register in (base.register_forward_hook, base.register_forward_pre_hook):
            handle = register(lambda *_: seen.append(1))
            output(1)
            handle.remove()
        own = lambda module, *_: seen.append(1) if module is base else None  # noqa: E731
        for register in ("forward_hook", "forward_pre_hook"):
            handle = getattr(nn.modules.module, f"register_module_{register}")(own)
            output(1)
            handle.remove()
        base.forward = lambda inputs: seen.append(1) or nn.Linear.forward(base, inputs)
        if mode == "merged":
            output(1)
        del base.forward
        output(0)


@torch.no_grad()
@pytest.mark.parametrize("is_resident", [True, False])
@pytest.mark.parametrize("what", ["restores", "begins"])
def test_a_weight_that_another_thread_writes_meanwhile(monkeypatch, is_resident, what):
    model, x = tuned("one"), torch.randn(1, 160)
    layer, expected = layer_of(model), exact(model, "one", x)
    plain, turns = linear_layers.output_of, []

    def disturbed(base, inputs):
        # In the place of another thread: state_dict() in the midst of the product, or a block that begins.
        if not turns:
            turns.append(1)
            if what == "restores":
                layer.write("weight", ["one"])
                layer.restore()
            else:
                layer.write("weight", ["one"])
        return plain(base, inputs)

    if is_resident:
        with resident(model):
            model(x)
            monkeypatch.setattr(linear_layers, "output_of", disturbed)
            assert relative_error(model(x), expected) < 1e-6
            assert turns
    else:
        monkeypatch.setattr("peft_sparse.tuners.sparse_ft.layers.active_weights.output_of", disturbed)
        assert relative_error(model(x), expected) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("is_resident", [True, False])
def test_values_in_the_hands_of_a_transform(is_resident):
    model, x = tuned("one"), torch.randn(2, 160)
    (_, _, _, delta) = next(iter_deltas(model, "one"))
    name = next(n for n, p in model.named_parameters() if p is delta.values)
    many = torch.stack([delta.values, 2 * delta.values, -delta.values])

    def output(values):
        return functional_call(model, {name: values}, (x,))

    def compute():
        return vmap(output)(many), jvp(output, (delta.values,), (torch.ones_like(delta.values),))[1]

    expected, slope = compute()
    if is_resident:
        with resident(model):
            model(x)
            expected, slope = compute()
    for row, factor in zip(expected, [1, 2, -1], strict=True):
        twin = copy.deepcopy(model)
        layer_of(twin).sparse_ft_weight["one"].values.data.mul_(factor)
        assert relative_error(row, exact(twin, "one", x)) < 1e-6
    ones = torch.zeros(130 * 160)
    ones[delta.indices.long()] = 1
    assert relative_error(slope, x.double() @ ones.view(130, 160).t().double()) < 1e-6


@torch.no_grad()
def test_a_copy_after_a_quick_forward():
    model, x = tuned("one"), torch.randn(1, 160)
    expected = exact(model, "one", x)
    with resident(model):
        model(x)
        file = io.BytesIO()
        torch.save(model, file)
        twin = copy.deepcopy(model)
    file.seek(0)
    for made in (twin, torch.load(file, weights_only=False), model):
        assert relative_error(made(x), expected) < 1e-6
        with resident(made):
            assert relative_error(made(x), expected) < 1e-6
            next(iter_deltas(made, "one"))[3].values.data.add_(1)
            assert relative_error(made(x), expected) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("mode", ["plain", "resident", "mixed", "merged"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_weight_that_has_become_smaller_is_never_read_beyond_its_end(mode, is_first):
    model, x = tuned("one", "two"), torch.randn(2, 160)
    layer = layer_of(model)
    base = layer.get_base_layer()
    names = {"adapter_names": ["one", "two"]} if mode == "mixed" else {}
    with resident(model) if mode == "resident" else nullcontext():
        if not is_first:
            layer(x, **names)
        # Of other memory, which ends where it ends.
        base.weight.data, base.bias.data = base.weight.data[:20].clone(), base.bias.data[:20].clone()
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            layer.merge() if mode == "merged" else layer(x, **names)

"""torch.func, second derivatives, and what records a model: a tuned model against its dense twin."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from peft_sparse import AdaSftConfig, BottleneckConfig, ConfigError, RandConfig, iter_deltas
from peft_sparse.core import ops


class Net(nn.Module):
    """A network of every kind of layer that can be tuned."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.conv = nn.Embedding(7, 6), nn.Conv1d(6, 6, 3, padding=1)
        self.lin, self.norm, self.out = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, ids):
        x = self.conv(self.emb(ids).transpose(-1, -2)).transpose(-1, -2)
        return self.out(torch.tanh(self.norm(self.lin(x)))).sum(-2)


IDS = torch.tensor([[1, 2, 4, 4], [0, 3, 3, 6], [5, 5, 1, 0]])
KINDS = ["sparse", "ada"]


def tuned(kind):
    config = {"density": 0.4, "target_modules": "all", "init_weights": False, "values_dtype": "float32"}
    if kind == "ada":
        model = get_peft_model(Net(), AdaSftConfig(target_modules="all-linear", init_weights=False))
    else:
        model = get_peft_model(Net(), RandConfig(**config))
    return model.double().eval()


def parts(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def dense_loss(kind):
    """The loss as a function of the trained tensors, through the merged model's plain layers."""
    merged = copy.deepcopy(tuned(kind)).merge_and_unload()
    source = tuned(kind)

    def loss(tensors, ids):
        # Differentiable again: the layers' own recorded path is not used here.
        weights = {}
        for name, _, parameter, delta in iter_deltas(source):
            base = dict(Net().double().named_parameters())[name]
            key = f"base_model.model.{name.removesuffix('.' + parameter)}.sparse_ft_{parameter}.default.values"
            total = torch.zeros(base.numel(), dtype=base.dtype).index_add(0, delta.indices.long(), tensors[key])
            weights[name] = base.detach() + total.view(base.shape)
        return functional_call(merged, weights, (ids,)).square().sum()

    return loss


def loss_of(model):
    def loss(tensors, ids):
        return functional_call(model, tensors, (ids,)).square().sum()

    return loss


@pytest.mark.parametrize("kind", KINDS)
def test_func_grad_is_the_gradient(kind):
    model = tuned(kind)
    model(IDS).square().sum().backward()
    found = grad(loss_of(model))({n: p.detach() for n, p in parts(model).items()}, IDS)
    assert found.keys() == parts(model).keys()
    for name, parameter in parts(model).items():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_each_example(kind):
    model = tuned(kind)
    tensors = {n: p.detach() for n, p in parts(model).items()}
    found = vmap(grad(loss_of(model)), in_dims=(None, 0))(tensors, IDS)
    for i, ids in enumerate(IDS):
        model.zero_grad()
        model(ids[None]).square().sum().backward()
        for name, parameter in parts(model).items():
            assert torch.allclose(found[name][i], parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_at_once(kind):
    model = tuned(kind)
    several = {n: torch.stack([p.detach(), 2 * p.detach()]) for n, p in parts(model).items()}
    found = vmap(loss_of(model), in_dims=(0, None))(several, IDS)
    for i in range(2):
        assert torch.allclose(found[i], loss_of(model)({n: t[i] for n, t in several.items()}, IDS))


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(kind):
    model = tuned(kind)
    tensors = {n: p.detach() for n, p in parts(model).items()}
    tangents = {n: torch.randn_like(p) for n, p in tensors.items()}
    _, found = jvp(lambda t: loss_of(model)(t, IDS), (tensors,), (tangents,))
    gradient = grad(loss_of(model))(tensors, IDS)
    want = sum((gradient[n] * tangents[n]).sum() for n in tensors)
    assert torch.allclose(found, want, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_functional_call_is_differentiated_at_its_own_tensors(kind):
    """Also in the backward, when the model has its own tensors back: the gradient of the input needs the weights."""
    model = tuned(kind)
    others = {n: (3 * p.detach()).requires_grad_() for n, p in parts(model).items()}
    loss = loss_of(model)(others, IDS)
    found = torch.autograd.grad(loss, list(others.values()))
    with torch.no_grad():
        for parameter in parts(model).values():
            parameter.mul_(3)
    model(IDS).square().sum().backward()
    for gradient, parameter in zip(found, parts(model).values(), strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind):
    model = tuned(kind)
    names = [n for n in parts(model) if "norm" not in n]
    fixed = {n: p.detach() for n, p in parts(model).items()}

    def loss(*tensors):
        return functional_call(model, {**fixed, **dict(zip(names, tensors, strict=True))}, (IDS,)).square().sum()

    inputs = tuple(parts(model)[n].detach().clone().requires_grad_() for n in names)
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_second_derivatives_are_those_of_the_dense_model():
    model, loss = tuned("sparse"), dense_loss("sparse")
    tensors = {n: p.detach().clone().requires_grad_() for n, p in parts(model).items()}

    def curvature(value):
        first = torch.autograd.grad(value, list(tensors.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), list(tensors.values()))

    ours = curvature(functional_call(model, tensors, (IDS,)).square().sum())
    dense = curvature(loss(tensors, IDS))
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in zip(ours, dense, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_after_a_cast_are_refused(kind):
    model = tuned(kind).float()
    layer = model.base_model.model.out
    x = torch.randn(2, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layer(x).float().square().sum()
    with pytest.raises(ConfigError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_traced_model_computes_for_other_inputs(kind, with_gradients):
    model = tuned(kind)
    with warnings.catch_warnings(), torch.set_grad_enabled(with_gradients):
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model.get_base_model(), (IDS,), check_trace=False)
        other = IDS.flip(0).roll(1, 1)[:2]
        found = traced(other)
        assert torch.allclose(found, model(other), rtol=1e-12)
    if with_gradients:
        found.square().sum().backward()
        gradients = [p.grad.clone() for p in parts(model).values()]
        model.zero_grad()
        model(other).square().sum().backward()
        pairs = zip(gradients, parts(model).values(), strict=True)
        assert all(torch.allclose(a, p.grad, rtol=1e-10, atol=1e-12) for a, p in pairs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model(kind, strict):
    model = tuned(kind)
    program = torch.export.export(model.get_base_model(), (IDS,), strict=strict)
    other = IDS.flip(0).roll(1, 1)
    assert torch.allclose(program.module()(other), model(other), rtol=1e-12)


def test_bottleneck_adapters_are_differentiated_by_torch_alone():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    base = BertModel(BertConfig(vocab_size=9, max_position_embeddings=8, **sizes), add_pooling_layer=False)
    model = get_peft_model(base, BottleneckConfig(bottleneck_size=2, init_weights=False)).double().eval()
    tensors = {n: p.detach() for n, p in parts(model).items()}

    def loss(tensors, ids):
        return functional_call(model, tensors, (ids,)).last_hidden_state.pow(3).sum()

    found = grad(loss)(tensors, IDS)
    loss(dict(parts(model)), IDS).backward()
    assert all(torch.allclose(found[n], p.grad) for n, p in parts(model).items())


def test_nothing_is_recorded_in_an_ordinary_forward():
    assert not ops.is_recorded()
    assert grad(lambda x: x * float(ops.is_recorded()))(torch.tensor(1.0)) == 1

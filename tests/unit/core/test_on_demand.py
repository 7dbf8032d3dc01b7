"""Tensors that are computed on demand: numbers, gradients, laziness, and that nothing is written into them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from peft_sparse import ConfigError
from peft_sparse.core.on_demand import on_demand

INDICES = torch.tensor([1, 5, 7, 9])


class Case:
    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        self.base, self.values = torch.randn(3, 4, dtype=dtype), nn.Parameter(torch.randn(4, dtype=dtype))
        self.calls = 0

    def make(self):
        self.calls += 1
        return torch.zeros(12, dtype=self.base.dtype).index_add(0, INDICES, self.values).view(3, 4) + self.base

    def tensor(self):
        return on_demand(self.base, self.make, [self.values], "read alone")


def test_asking_what_it_is_computes_nothing():
    case = Case()
    tensor = case.tensor()
    assert tensor.shape == (3, 4)
    assert tensor.dtype == torch.float32
    assert tensor.device == case.base.device
    assert tensor.requires_grad
    assert tensor.numel() == 12
    assert tensor.dim() == 2
    assert case.calls == 0
    assert torch.equal(tensor, case.make())


class Product(torch.autograd.Function):
    """What kernels do: a Function that computes with tensors outside of autograd."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


@pytest.mark.parametrize("product", [torch.nn.functional.linear, Product.apply, lambda x, w: x @ w.squeeze().t()])
def test_the_gradient_is_that_of_the_tensor_itself(product):
    case, x = Case(), torch.randn(2, 4)
    product(x, case.tensor()).square().sum().backward()
    found, case.values.grad = case.values.grad, None
    product(x, case.make()).square().sum().backward()
    assert torch.equal(found, case.values.grad)


def test_twice():
    case, x = Case(torch.float64), torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def run(values, x):
        tensor = case.tensor()
        return torch.tanh(x @ tensor.t()[:, :2]).square().sum() + tensor.chunk(3)[1].pow(3).sum()

    assert torch.autograd.gradcheck(run, (case.values, x))
    assert torch.autograd.gradgradcheck(run, (case.values, x))


WRITES = {
    "mul_": lambda t: t.mul_(2),
    "data": lambda t: t.data.mul_(2),
    "assigned data": lambda t: setattr(t, "data", torch.zeros(3, 4)),
    "init": nn.init.normal_,
    "item": lambda t: t.data.__setitem__(0, 0.0),
    "view": lambda t: t.detach().view(-1)[2:].fill_(0),
    "transposed": lambda t: t.data.t().mul_(2),
    "chunk": lambda t: t.data.chunk(2)[0].zero_(),
    "out": lambda t: torch.add(torch.ones(3, 4), 1, out=t.detach()),
    "requires_grad_": lambda t: t.requires_grad_(True),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_is_refused(write):
    with pytest.raises(ConfigError, match="read alone"):
        WRITES[write](Case().tensor())


def test_what_reads_its_memory_reads_the_numbers():
    case = Case()
    want = case.make().detach()
    with torch.no_grad():
        tensor = case.tensor()
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    assert torch.equal(torch.load(file), want)
    assert torch.equal(load(save({"a": tensor}))["a"], want)
    assert torch.equal(copy.deepcopy(tensor), want)
    assert (tensor.numpy() == want.numpy()).all()
    assert tensor.tolist() == want.tolist()
    assert type(copy.deepcopy(tensor)) is torch.Tensor

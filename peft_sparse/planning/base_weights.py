"""What the weights of a base model take, quantised or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

# bitsandbytes: weights that share a scale in NF4.
_NF4_BLOCK = 64


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def tensors_of(model: nn.Module) -> dict[int, Tensor]:
    """{id: tensor} of a model's parameters and buffers; tied ones once."""
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}


def base_bytes(model: PreTrainedModel, *, load_in_4bit: bool = False) -> int:
    """Bytes of the weights and buffers of a base model."""
    own = {key: tensor.nbytes for key, tensor in tensors_of(model).items()}
    if load_in_4bit:
        for module in _quantised(model):
            own[id(module.weight)] = ceil(module.weight.numel() / 2) + 4 * ceil(module.weight.numel() / _NF4_BLOCK)
    return sum(own.values())


def multiply_as_packed(model: PreTrainedModel) -> None:
    """Let those linear layers that are quantised in 4 bits take what bitsandbytes' own take beside their result."""
    for module in _quantised(model):
        if type(module) is nn.Linear:
            module.__class__ = _Packed


def _quantised(model: PreTrainedModel) -> Iterator[nn.Linear]:
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield module


class _Packed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _PackedProduct.apply(x.to(self.weight.dtype), self.weight, self.bias)
        return product.to(x.dtype)


class _PackedProduct(torch.autograd.Function):
    """A product with a weight that is dequantised for it, in the forward and again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, torch.empty_like(weight), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return grad @ torch.empty_like(weight), None, None

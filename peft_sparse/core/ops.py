"""Differentiable operations on weights with sparse deltas: what the layers of the tuners call.

None of them keeps a tensor of the weight's size between forward and backward, nor makes one for the gradient where a
sampled product is cheaper (`backends.sddmm` holds the rule). Where torch records or transforms what runs
(`is_recorded`) they are plain differentiable torch instead, so that it sees all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import ConfigError
from .autocast import autocast_dtype, without_autocast
from .backends import sddmm
from .backends.products import wide_product
from .few_rows import FEW_ROWS, GetParts, add_parts_, takes_parts
from .observer import GradientObserver, current_pass, receive_whole, remember_outer, wanted_on

Deltas = Sequence[tuple[Tensor, Tensor]]


def is_recorded() -> bool:
    """Whether torch records or transforms what runs: torch.compile, torch.export, torch.jit.trace, torch.func and
    forward-mode differentiation. Gradients of our own, and shapes that depend on numbers, have no place there.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_kept() -> bool:
    """Whether torch records a program that goes on to use the very parameters: torch.export, torch.jit.trace."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def scatter(values: Tensor, indices: Tensor, shape: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    """A dense tensor of zeros with `values` at flat positions; differentiable with respect to the values.

    Args:
        values: [k] floating point.
        indices: [k] flat row-major positions, unique.
        shape: of the result.
        dtype: of the result.
    """
    zeros = torch.zeros(prod(shape), dtype=dtype, device=values.device)
    return zeros.scatter(0, indices.long(), values.to(dtype)).view(tuple(shape))


def linear(
    x: Tensor,
    make_weight: Callable[[], Tensor],
    bias: Tensor | None,
    deltas: Deltas,
    *,
    fan_in_fan_out: bool = False,
    observers: Sequence[GradientObserver] = (),
    guard: AbstractContextManager[Any] | None = None,
    parts: GetParts | None = None,
) -> Tensor:
    """A linear layer whose weight holds sparse deltas: `x @ W'.T + bias`.

    The gradient reaches `x`, `bias` and the values; the weight itself gets none.

    Args:
        x: [..., I].
        make_weight: gives W' [O, I] ([I, O] if `fan_in_fan_out`), all deltas already in it, outside of autograd. Called
            once in the forward and, if the gradient of `x` is wanted, once in the backward; both calls must give the
            same numbers.
        bias: [O] or None.
        deltas: for each delta values [k_i] and indices [k_i] (flat row-major positions in W', sorted and unique).
            Values that do not require a gradient cost nothing here.
        fan_in_fan_out: the weight is stored as [I, O] (transformers' Conv1D).
        observers: who else sees the weight's gradient; they see nothing where torch records (`is_recorded`).
        guard: is entered whenever W' is made, and left when it has been used; nothing if None.
        parts: gives W' in its parts, for as long as it is entered, if it can be had so. For a few rows of `x` on a CPU
            their products are added up then, and rounded in another order.

    Returns:
        [..., O], in the dtype that `torch.nn.functional.linear` would give, also under autocast.

    Raises:
        ConfigError: in a backward with `create_graph` that follows a cast by autocast.

    Cost: saves `x` for the backward, if any values require a gradient, and nothing else that is not there already.
        Differentiated twice (`create_graph=True`), it forms dense gradients.
    """
    if is_recorded():
        weight = _with_gradient(make_weight(), deltas)
        return F.linear(x, weight.t() if fan_in_fan_out else weight, bias)
    tensors = [values for values, _ in deltas]
    wanted = any(values.requires_grad for values in tensors)
    if not torch.is_grad_enabled() or not (wanted or x.requires_grad or (bias is not None and bias.requires_grad)):
        with guard or nullcontext():
            added = _added_up(x, bias, parts, fan_in_fan_out)
            if added is not None:
                return added
            weight = make_weight()
            return F.linear(x, weight.t() if fan_in_fan_out else weight, bias)
    shared = sddmm.share_input(x) if wanted else None
    supports = tuple(indices for _, indices in deltas)
    source = make_weight, guard or nullcontext(), parts
    flat = _Linear.apply(x, bias, source, supports, fan_in_fan_out, shared, tuple(observers), *tensors)
    return flat.view(*x.shape[:-1], flat.shape[-1])


def _added_up(
    x: Tensor,
    bias: Tensor | None,
    parts: GetParts | None,
    transposed: bool,
) -> Tensor | None:
    """`x @ W'.T + bias` as the sum of two products (`x @ W' + bias` if `transposed`); None where W' is to be made."""
    if parts is None or x.numel() > FEW_ROWS * x.shape[-1]:
        return None
    with parts() as made:
        if made is None or not takes_parts(x, made):
            return None
        base = F.linear(x.detach(), made.weight.t() if transposed else made.weight, bias)
        return add_parts_(base, x, made, fan_in_fan_out=transposed)


def _with_gradient(weight: Tensor, deltas: Deltas) -> Tensor:
    """W', which holds the values already, with their gradient."""
    weight = weight.detach()
    for values, indices in deltas:
        # Zeros in the forward, the identity in the backward.
        weight = weight + scatter(values - values.detach(), indices, weight.shape, dtype=weight.dtype)
    return weight


class _Linear(torch.autograd.Function):
    """The body of `linear` outside of compilation, giving [N, O]: models write into the output of their layers in place
    (DeBERTa), which torch forbids for a view that a Function made.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        source: tuple[Callable[[], Tensor], AbstractContextManager[Any], GetParts | None],
        indices: tuple[Tensor, ...],
        fan_in_fan_out: bool,
        shared: sddmm.SharedInput | None,
        observers: tuple[GradientObserver, ...],
        *values: Tensor,
    ) -> Tensor:
        ctx.make_weight, ctx.guard, ctx.parts = source
        ctx.fan_in_fan_out, ctx.shared, ctx.observers, ctx.x_shape = fan_in_fan_out, shared, observers, x.shape
        ctx.made_in = current_pass()
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        ctx.autocast_dtype = dtype = autocast_dtype(x)
        if dtype is not None:
            x = x.to(dtype) if shared is None else shared.cast(x, dtype)
            bias = None if bias is None else bias.to(dtype)
        with ctx.guard:
            flat = x.reshape(-1, x.shape[-1])
            added = _added_up(flat, bias, ctx.parts, fan_in_fan_out) if dtype is None else None
            if added is not None:
                result, num_columns = added, flat.shape[1]
                ctx.shape = (num_columns, added.shape[1]) if fan_in_fan_out else (added.shape[1], num_columns)
            else:
                weight = ctx.make_weight()
                ctx.shape = tuple(weight.shape)
                weight = weight if dtype is None else weight.to(dtype)
                result = F.linear(flat, weight.t() if fan_in_fan_out else weight, bias)
        tuned = [support for support, needed in zip(indices, ctx.needs_input_grad[7:], strict=True) if needed]
        count, in_use = sum(support.numel() for support in tuned), sddmm.shape_in_use(tuned, ctx.shape)
        ctx.sampled = sddmm.prefer_sampled(count, in_use, device=x.device)
        if shared is not None and ctx.sampled:
            shared.join()
        # The values are saved only so that torch notices if they change before the backward makes W' again.
        ctx.save_for_backward(x if shared is not None else None, *indices, *values)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        indices, values = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        if torch.is_grad_enabled():
            return _twice_differentiable(ctx, grad, x, indices, values)
        with without_autocast(grad.device.type):
            grad_x = _grad_input(ctx, grad).view(ctx.x_shape) if ctx.needs_input_grad[0] else None
            flat = grad.reshape(-1, grad.shape[-1])
            grad_bias = flat.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
            grad_values: list[Tensor | None] = [None] * len(values)
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad[7:]) if needed]
            if wanted:
                found = sddmm.weight_gradients(
                    flat,
                    x.reshape(-1, x.shape[-1]),
                    [*(indices[i] for i in wanted), *(wanted_on(observer, x.device) for observer in ctx.observers)],
                    ctx.shape,
                    transposed=ctx.fan_in_fan_out,
                    shared=ctx.shared,
                    sampled=ctx.sampled,
                )
                for i, gradient in zip(wanted, found, strict=False):
                    grad_values[i] = gradient.to(values[i].dtype)
                remember_outer(ctx.made_in)
                for observer, gradient in zip(ctx.observers, found[len(wanted) :], strict=True):
                    observer.receive(gradient)
        return grad_x, grad_bias, None, None, None, None, None, *grad_values


def _twice_differentiable(
    ctx: Any, grad: Tensor, x: Tensor | None, indices: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """`_Linear.backward` in operations that can be differentiated again, at dense cost."""
    if ctx.autocast_dtype not in (None, ctx.x_dtype):
        raise twice_under_autocast()
    with without_autocast(grad.device.type):
        with ctx.guard:
            made = _with_gradient(ctx.make_weight(), list(zip(values, indices, strict=True)))
        made = made if ctx.autocast_dtype is None else made.to(ctx.autocast_dtype)
        grad_x = (grad @ (made.t() if ctx.fan_in_fan_out else made)).to(ctx.x_dtype).view(ctx.x_shape)
        grad_values: list[Tensor | None] = [None] * len(values)
        if x is not None:
            flat = x.reshape(-1, x.shape[-1])
            dense = (wide_product(flat, grad) if ctx.fan_in_fan_out else wide_product(grad, flat)).reshape(-1)
            grad_values = [
                dense[place.long()].to(value.dtype) if needed else None
                for place, value, needed in zip(indices, values, ctx.needs_input_grad[7:], strict=True)
            ]
            remember_outer(ctx.made_in)
            for observer in ctx.observers:
                receive_whole(observer, dense)
        grad_bias = grad.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
    return grad_x, grad_bias, None, None, None, None, None, *grad_values


def twice_under_autocast() -> ConfigError:
    """The error for a second derivative through a cast by autocast: the cast would be missing from it."""
    return ConfigError(
        "a tuned layer cannot be differentiated twice (create_graph=True) where autocast cast its input. Compute this "
        "forward outside of autocast, or cast the model itself."
    )


def _grad_input(ctx: Any, grad: Tensor) -> Tensor:
    with ctx.guard:
        if ctx.autocast_dtype is None:
            added = _added_up(grad, None, ctx.parts, not ctx.fan_in_fan_out)
            if added is not None:
                return added.to(ctx.x_dtype)
        weight = ctx.make_weight()
        if ctx.autocast_dtype is not None:
            weight = weight.to(ctx.autocast_dtype)
        return (grad @ (weight.t() if ctx.fan_in_fan_out else weight)).to(ctx.x_dtype)

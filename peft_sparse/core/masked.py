"""Weights under soft masks: the one formula of Ada-SFT, and a linear layer that computes with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import autocast_dtype, without_autocast
from .backends.products import wide_product
from .ops import is_recorded, twice_under_autocast


@dataclass(frozen=True, eq=False)
class MaskedPart:
    """What one adapter makes of a weight: (weight + difference) * mask.

    Attributes:
        scores: the mask's scores, in the weight's shape, see `soft_mask`; None for a mask of ones.
        difference: what is added to the weight before it is masked, in its shape; None for nothing.
        initial_mask: in (0, 1).
        from_identity: whether masks are relative to `initial_mask`.
    """

    scores: Tensor | None
    difference: Tensor | None
    initial_mask: float
    from_identity: bool


def soft_mask(scores: Tensor, initial_mask: float, *, from_identity: bool) -> Tensor:
    """sigmoid(S), or sigmoid(S) / initial_mask, where S = logit(initial_mask) + scores.

    Args:
        scores: how far S has moved from its start; floating point, of any shape.
        initial_mask: sigmoid(S) at the start, in (0, 1).
        from_identity: divide by `initial_mask`: scores of zero give exactly 1, whatever the device.

    Returns:
        In the dtype and shape of `scores`; differentiable. At most 1, or at most 1 / initial_mask.
    """
    odds = (1 - initial_mask) / initial_mask
    # Not torch.sigmoid: its last bit depends on the place of an element in memory, so that no quotient would be 1.
    # exp(0) is 1 everywhere. Beyond the clamp a mask is zero in any dtype that weights have.
    at_start = 1 + odds * torch.ones((), dtype=scores.dtype)
    mask = at_start / (1 + odds * torch.exp(-scores.clamp(min=-80.0)))
    return mask if from_identity else mask * initial_mask


def masked_weight(weight: Tensor, parts: Sequence[MaskedPart], *, dtype: torch.dtype | None = None) -> Tensor:
    """The weight with adapters in it: of one (weight + difference) * mask, of several the sum of what each changes.

    Args:
        weight: any shape and floating dtype.
        parts: one per adapter, at least one.
        dtype: of the result; the weight's own if None.

    Returns:
        A new tensor, differentiable in the weight and in every part. Computed in float32 (float64 if the weight is) and
        rounded once.
    """
    wide = weight.to(working_dtype(weight.dtype, parts))
    tuned = [_apply(part, wide) for part in parts]
    total = tuned[0] if len(tuned) == 1 else reduce(torch.add, [each - wide for each in tuned], wide)
    return total.to(weight.dtype if dtype is None else dtype)


def working_dtype(dtype: torch.dtype, parts: Sequence[MaskedPart]) -> torch.dtype:
    """What masks and differences are computed in: at least float32."""
    own = [tensor.dtype for part in parts for tensor in (part.scores, part.difference) if tensor is not None]
    return reduce(torch.promote_types, own, torch.promote_types(dtype, torch.float32))


def _apply(part: MaskedPart, wide: Tensor) -> Tensor:
    if part.difference is not None:
        wide = wide + part.difference.to(wide.dtype)
    if part.scores is not None:
        wide = wide * soft_mask(part.scores.to(wide.dtype), part.initial_mask, from_identity=part.from_identity)
    return wide


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[MaskedPart], *, fan_in_fan_out: bool = False
) -> Tensor:
    """A linear layer whose weight is `masked_weight(weight, parts)`.

    Args:
        x: [..., I].
        weight: [O, I] ([I, O] if `fan_in_fan_out`).
        bias: [O] or None.
        parts: one per adapter, at least one.
        fan_in_fan_out: the weight is stored as [I, O] (transformers' Conv1D).

    Returns:
        [..., O], in the dtype that `torch.nn.functional.linear` would give, also under autocast.

    Cost: the masked weight is formed in the forward and again in the backward, and not kept between them; the gradient
        of scores or differences is dense. Where torch records what runs (`is_recorded`), and where the weight itself
        trains, it is plain torch.

    Raises:
        ConfigError: in a backward with `create_graph` that follows a cast by autocast.
    """
    if is_recorded() or weight.requires_grad or not torch.is_grad_enabled():
        made = masked_weight(weight, parts)
        return F.linear(x, made.t() if fan_in_fan_out else made, bias)
    tensors = [tensor for part in parts for tensor in (part.scores, part.difference)]
    flat = _MaskedLinear.apply(x, weight, bias, tuple(parts), fan_in_fan_out, *tensors)
    return flat.view(*x.shape[:-1], flat.shape[-1])


class _MaskedLinear(torch.autograd.Function):
    """The body of `masked_linear`, giving [N, O]: models write into the output of their layers in place (DeBERTa),
    which torch forbids for a view that a Function made.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        parts: tuple[MaskedPart, ...],
        fan_in_fan_out: bool,
        *tensors: Tensor | None,
    ) -> Tensor:
        made = masked_weight(weight, parts)
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        ctx.parts, ctx.fan_in_fan_out, ctx.autocast_dtype = parts, fan_in_fan_out, autocast_dtype(x)
        if ctx.autocast_dtype is not None:
            x, made = x.to(ctx.autocast_dtype), made.to(ctx.autocast_dtype)
            bias = None if bias is None else bias.to(ctx.autocast_dtype)
        ctx.x_shape = x.shape
        wanted = any(ctx.needs_input_grad[5:])
        # Scores and differences are saved so that torch notices if they change before the backward.
        ctx.save_for_backward(x if wanted else None, weight, *tensors)
        return F.linear(x.reshape(-1, x.shape[-1]), made.t() if fan_in_fan_out else made, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tensors = ctx.saved_tensors
        twice = torch.is_grad_enabled()
        if twice and ctx.autocast_dtype not in (None, ctx.x_dtype):
            raise twice_under_autocast()
        needed = ctx.needs_input_grad[5:]
        leaves = list(tensors)
        if not twice:
            leaves = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        parts = [
            MaskedPart(scores, difference, part.initial_mask, part.from_identity)
            for part, scores, difference in zip(ctx.parts, leaves[::2], leaves[1::2], strict=True)
        ]
        with without_autocast(grad.device.type):
            with torch.enable_grad():
                # Not yet rounded to the weight's dtype, so that neither is its gradient.
                made = masked_weight(weight.detach(), parts, dtype=working_dtype(weight.dtype, parts))
            grad_x = grad_bias = None
            if ctx.needs_input_grad[0]:
                factor = made if twice else made.detach()
                factor = factor.to(weight.dtype).to(ctx.autocast_dtype or weight.dtype)
                grad_x = (grad @ (factor.t() if ctx.fan_in_fan_out else factor)).to(ctx.x_dtype).view(ctx.x_shape)
            if ctx.needs_input_grad[2]:
                grad_bias = grad.sum(0).to(ctx.bias_dtype)
            grads: list[Tensor | None] = [None] * len(leaves)
            wanted = {i: leaf for i, leaf in enumerate(leaves) if leaf is not None and needed[i]}
            if wanted:
                flat = x.reshape(-1, x.shape[-1])
                left, right = (flat, grad) if ctx.fan_in_fan_out else (grad, flat)
                grad_weight = wide_product(left, right).to(made.dtype)
                found = torch.autograd.grad(made, list(wanted.values()), grad_weight, create_graph=twice)
                for i, gradient in zip(wanted, found, strict=True):
                    grads[i] = gradient
        return grad_x, None, grad_bias, None, None, *grads

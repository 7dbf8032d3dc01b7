"""The estimated gradients that the moments of grown weights start from, clipped as later gradients will be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite, sqrt

from torch.optim import Optimizer

from ...core.sharded import whole
from ...optim.reindex import GrownGradients
from ...optim.step_watch import all_parameters
from ...selection.replacement import Replacement
from ...tuners.sparse_ft.layers.delta import AdapterDelta
from .estimate import Estimate


def grown_gradients(estimate: Estimate, replacement: Replacement, *, clip_factor: float) -> GrownGradients:
    """The estimated gradients of the weights that a replacement grows.

    Args:
        estimate: of the tensor's candidates.
        replacement: of the tensor.
        clip_factor: of `clip_factor`.
    """
    grown = replacement.candidates
    mean, mean_squared = (part[estimate.nominated][grown] for part in (estimate.mean, estimate.mean_squared))
    return GrownGradients(mean * clip_factor, mean_squared * clip_factor**2, max(1, estimate.updates))


def clip_factor(
    max_norm: float | None,
    optimizers: Iterable[Optimizer],
    *,
    deltas: Mapping[str, AdapterDelta],
    replacements: Mapping[str, Replacement],
    estimates: Mapping[str, Estimate],
) -> float:
    """By how much clipping will shrink gradients from now on, against those that were estimated.

    The estimates were clipped along with the gradient of the old support. A new support of larger gradients is clipped
    harder, and moments that were seeded without regard to that would be too large for the gradients that follow: the
    second moment forgets slowly, so the steps of all grown weights would be too small for long.

    Args:
        max_norm: what the gradients of all the optimizers' parameters together are clipped to; None for no clipping.
        optimizers: which still have the gradients of the update that was just made.
        deltas, replacements, estimates: of the adapter, by parameter name, just before the support changes.

    Returns:
        a factor in (0, 1]: `max_norm` over the norm that is to be expected of the new support and of all else.

    Source: none; the thesis (7.3.1) does not mention clipping. Measured with `tests/benchmarks/instruction_quality.py`:
    the norm of 0.56 of a random support becomes 3.7 with the first reselection, and held-out loss falls by 0.010.
    """
    if max_norm is None or not estimates:
        return 1.0
    own = {id(delta.held_values) for delta in deltas.values()}
    # Of optimizers around others the same parameter is among those of each.
    others = {id(p): p for optimizer in optimizers for p in all_parameters(optimizer) if id(p) not in own}
    total = sum(float(whole(p.grad).float().square().sum()) for p in others.values() if p.grad is not None)
    for name, replacement in replacements.items():
        gradient = deltas[name].held_values.grad
        if gradient is not None:
            kept = replacement.order[replacement.order < replacement.old_count]
            total += float(whole(gradient)[kept.to(gradient.device)].float().square().sum())
        if name in estimates:
            estimate = estimates[name]
            total += float(estimate.mean_squared[estimate.nominated][replacement.candidates].sum())
    return min(1.0, max_norm / sqrt(total)) if total > 0 and isfinite(total) else 1.0

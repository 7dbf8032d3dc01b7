"""How strongly a support acts on a layer's output, and by how much steps on it have to be smaller for that.

A step of the same size eta on every tuned weight of a linear layer changes its output by about
eta * sqrt(sum over the support of x_j ** 2): a weight acts by the input of its column. Supports that gradients choose
lie where inputs are large, so per unit of step they act several times as strongly as random ones, and a rate that suits
the one is too large or too small for the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, sqrt

from torch import Tensor

# A few weights in columns of hardly any input would else take steps of any size.
LARGEST = 4.0


def step_scale(energies: Tensor, indices: Tensor, shape: Sequence[int], *, transposed: bool = False) -> float:
    """By how much to scale the steps on a support, for them to act as those on a random one do.

    Args:
        energies: [I] mean squared input of each column of the weight, over tokens.
        indices: [k] flat row-major positions of the tuned weights.
        shape: of the weight: [O, I], or [I, O] if `transposed`.
        transposed: whether the weight is stored as [in, out] (transformers' `Conv1D`).

    Returns:
        sqrt(mean energy of all columns / mean energy of the columns of the tuned weights), at most `LARGEST`: about 1
        for a random support, a seventh for one of large gradients. 1 where nothing is tuned or no input was seen.

    Source: none; measured with `tests/benchmarks/instruction_quality.py` and `support_curvature.py`.
    """
    if indices.numel() == 0:
        return 1.0
    flat = indices.long()
    columns = flat.div(shape[1], rounding_mode="floor") if transposed else flat % shape[1]
    wide = energies.double()
    everywhere, on_support = float(wide.mean()), float(wide[columns.to(wide.device)].mean())
    scale = sqrt(everywhere / on_support) if everywhere > 0 and on_support > 0 else 1.0
    return min(scale, LARGEST) if isfinite(scale) else 1.0

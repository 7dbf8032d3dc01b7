"""What it means that several processes came to the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_replicas(results: list[dict[str, Any]]) -> None:
    """Every process holds the same, bit for bit."""
    first = results[0]
    for other in results[1:]:
        assert other.keys() == first.keys()
        for name, expected in first.items():
            if isinstance(expected, Tensor):
                assert torch.equal(other[name], expected), name
            else:
                assert other[name] == expected, name


def assert_joined(found: dict[str, Any], expected: dict[str, Any], *, tolerance: float = 1e-4) -> None:
    """Several processes came to what one does on the joined batch: equal supports, counts and ages.

    Means over two halves are rounded otherwise than the mean over the whole, in float32 (2**-24). Where a gradient is
    near zero, Adam divides by its size, and ten updates carry that on; 1e-4 of a tensor's largest entry is four times
    what was seen (2.3e-5, of the bias of queries, on a processor with AMX; else 1e-6).
    """
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        if not isinstance(wanted, Tensor):
            assert found[name] == wanted, name
        elif wanted.is_floating_point() and wanted.numel():
            error = (found[name].double() - wanted.double()).abs().max()
            # The bias of keys does not change a softmax: its gradient is zero but for noise.
            assert error <= tolerance * wanted.double().abs().max() or name.endswith("key.bias"), (name, float(error))
        else:
            assert torch.equal(found[name], wanted), name

"""How many candidates lie too near the cut, against a loop over confidence intervals."""

from __future__ import annotations

import pytest
import torch

from peft_sparse.errors import SelectionError
from peft_sparse.selection.replacement import count_uncertain


def by_hand(gradients: torch.Tensor, num_grown: int) -> int:
    """gradients [updates, candidates]; the sample standard error of each mean, by torch."""
    mean, error = gradients.mean(0), gradients.std(0, correction=1) / len(gradients) ** 0.5
    ordered = mean.abs().sort(descending=True).values
    cut = (ordered[num_grown - 1] + ordered[num_grown]) / 2
    return sum(bool(abs(abs(m) - cut) < 2 * e) for m, e in zip(mean, error, strict=True))


@pytest.mark.parametrize("samples", [2, 5, 40])
@pytest.mark.parametrize("num_grown", [1, 10, 29])
def test_counts_intervals_that_enclose_the_cut(samples, num_grown):
    generator = torch.Generator().manual_seed(samples)
    signal = torch.linspace(-2, 2, 30, dtype=torch.float64)
    gradients = signal + torch.randn(samples, 30, generator=generator, dtype=torch.float64)
    found = count_uncertain(gradients.mean(0), gradients.square().mean(0), samples=samples, num_grown=num_grown)
    assert found == by_hand(gradients, num_grown)


def test_more_samples_make_it_clearer():
    generator = torch.Generator().manual_seed(0)
    signal = torch.linspace(-2, 2, 200, dtype=torch.float64)
    gradients = signal + torch.randn(400, 200, generator=generator, dtype=torch.float64)
    counts = [
        count_uncertain(g.mean(0), g.square().mean(0), samples=len(g), num_grown=50) for g in (gradients[:5], gradients)
    ]
    assert counts[0] > 2 * counts[1] > 0


@pytest.mark.parametrize("num_grown", [0, 7])
def test_without_a_cut_nothing_is_uncertain(num_grown):
    assert count_uncertain(torch.ones(7), torch.full((7,), 9.0), samples=3, num_grown=num_grown) == 0


@pytest.mark.parametrize(
    ("samples", "num_grown", "message"), [(1, 2, "samples must be >= 2"), (3, 8, "between 0 and 7")]
)
def test_errors(samples, num_grown, message):
    with pytest.raises(SelectionError, match=message):
        count_uncertain(torch.ones(7), torch.ones(7), samples=samples, num_grown=num_grown)

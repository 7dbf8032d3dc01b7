"""Random supports are exact, repeatable and uniform; differences are exact."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from peft_sparse.core.indices import check_indices
from peft_sparse.errors import SelectionError
from peft_sparse.selection.change import difference
from peft_sparse.selection.random import random_counts, random_indices

# Sparse (sorted draws), dense (a mask) and very dense (a mask of what is left out).
REGIMES = [(1000, 10), (1000, 200), (1000, 800)]


@pytest.mark.parametrize(("numel", "k"), [*REGIMES, (0, 0), (1, 0), (1, 1), (7, 7), (2, 1), (2**33, 50), (31, 1)])
def test_exactly_k_sorted_and_unique(numel: int, k: int) -> None:
    indices = random_indices(numel, k, seed=0, name="w")
    assert indices.numel() == k
    check_indices(indices, numel, name="w")


def test_indices_reach_beyond_int32() -> None:
    assert int(random_indices(2**33, 50, seed=0, name="w").max()) > 2**32


@pytest.mark.parametrize(("numel", "k"), REGIMES)
def test_a_function_of_seed_and_name_alone(numel: int, k: int) -> None:
    first = random_indices(numel, k, seed=3, name="w").tolist()
    torch.manual_seed(99)
    np.random.seed(99)
    random_indices(numel, k, seed=3, name="v")
    assert random_indices(numel, k, seed=3, name="w").tolist() == first
    assert random_indices(numel, k, seed=4, name="w").tolist() != first
    assert random_indices(numel, k, seed=3, name="v").tolist() != first


def test_the_draw_is_the_same_on_every_machine() -> None:
    # Written down once: a change here changes what every user's seed means.
    assert random_indices(1000, 5, seed=0, name="model.layers.0.q.weight").tolist() == [209, 317, 419, 653, 786]


@pytest.mark.parametrize(("numel", "k"), [(40, 1), (40, 8), (40, 30)])
def test_positions_and_pairs_are_uniform(numel: int, k: int) -> None:
    draws = 4000
    drawn = np.zeros((draws, numel))
    for seed in range(draws):
        drawn[seed, random_indices(numel, k, seed=seed, name="w").numpy()] = 1
    p = k / numel
    z = (drawn.sum(0) - draws * p) / np.sqrt(draws * p * (1 - p))
    # Sum of squares of `numel` standard normals whose sum is fixed: chi square with numel - 1 degrees, here 39.
    chi2 = float((z**2).sum() * (numel - 1) / numel)
    assert 14 < chi2 < 80, chi2  # two tails of about 1e-4 each
    # Two positions together: without replacement, P = k (k - 1) / (n (n - 1)).
    both = drawn[:, 0::2] * drawn[:, 1::2]
    pair = k * (k - 1) / (numel * (numel - 1))
    z_pair = (both.sum() - both.size * pair) / max(1.0, np.sqrt(both.size * pair * (1 - pair)))
    assert abs(z_pair) < 4.5


@pytest.mark.parametrize(("numel", "k"), [(10_000_000, 200_000), (1_000_000, 300_000)])
def test_large_draws_cover_the_range_evenly(numel: int, k: int) -> None:
    counts = np.bincount(random_indices(numel, k, seed=1, name="w").numpy() * np.int64(100) // numel, minlength=100)
    p = 0.01
    variance = k * p * (1 - p) * (numel - k) / (numel - 1)
    chi2 = float(((counts - k * p) ** 2).sum() / variance * 0.99)
    assert 52 < chi2 < 165, chi2


def test_ten_million_of_a_billion_take_seconds() -> None:
    start = time.process_time()
    indices = random_indices(10**9, 10**7, seed=0, name="w")
    elapsed = time.process_time() - start
    assert indices.numel() == 10**7
    check_indices(indices, 10**9, name="w")
    assert elapsed < 20, f"{elapsed:.1f} s; about 1 s on a quiet core"


@pytest.mark.parametrize(
    ("numel", "k", "seed", "match"),
    [
        (4, 5, 0, r"5 random weights are asked from layer\.w: ask for 0 to 4"),
        (4, -1, 0, r"-1 random weights are asked from layer\.w"),
        (4, 2, -1, "seed must be >= 0, got -1"),
    ],
)
def test_bad_draws(numel: int, k: int, seed: int, match: str) -> None:
    with pytest.raises(SelectionError, match=match):
        random_indices(numel, k, seed=seed, name="layer.w")
    with pytest.raises(SelectionError, match=match):
        random_counts([numel // 2, numel - numel // 2], k, seed=seed, name="layer.w")


def test_random_counts_are_hypergeometric() -> None:
    sizes, k, draws = [30, 50, 20], 40, 6000
    counts = np.array([random_counts(sizes, k, seed=seed, name="g") for seed in range(draws)])
    assert (counts.sum(1) == k).all()
    assert (counts >= 0).all()
    assert (counts <= sizes).all()
    share = np.array(sizes) / 100
    variance = k * share * (1 - share) * (100 - k) / 99
    z = (counts.mean(0) - k * share) / np.sqrt(variance / draws)
    assert np.abs(z).max() < 4.5
    # The variance is what tells it from independent binomials (0.6 of theirs) and from fixed proportions (zero).
    assert np.allclose(counts.var(0), variance, rtol=0.1)


def test_random_counts_at_the_ends() -> None:
    assert random_counts([3, 0, 4], 0, seed=0, name="g") == [0, 0, 0]
    assert random_counts([3, 0, 4], 7, seed=0, name="g") == [3, 0, 4]
    assert random_counts([9], 4, seed=0, name="g") == [4]
    assert random_counts([], 0, seed=0, name="g") == []
    nearly = random_counts([3, 0, 4], 6, seed=0, name="g")
    assert sum(nearly) == 6
    assert nearly[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_difference_is_taken_in_float32(dtype: torch.dtype) -> None:
    original = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=dtype)
    weight = torch.tensor([[1.0, -1.5], [0.25, 3.5]], dtype=dtype, requires_grad=True)
    moved = difference(weight, original)
    assert moved.dtype == torch.float32
    assert not moved.requires_grad
    assert moved.tolist() == [[0.0, 0.5], [-0.25, 0.5]]
    assert weight.tolist() == [[1.0, -1.5], [0.25, 3.5]], "the weight itself was changed"


def test_difference_sees_the_smallest_step() -> None:
    original = torch.tensor([1.0, 1e-38, 256.0])
    weight = torch.nextafter(original, torch.tensor(torch.inf))
    assert (difference(weight, original) > 0).all()
    # bfloat16 has steps of 2 at 256; the difference is taken after widening.
    assert difference(torch.tensor([258.0]).bfloat16(), torch.tensor([257.0])).tolist() == [1.0]
    # float64 steps that float32 cannot tell apart at 1.0 still count.
    assert difference(torch.tensor([1.0 + 1e-12], dtype=torch.float64), torch.tensor([1.0])).item() == pytest.approx(
        1e-12, rel=1e-3, abs=0
    )


def test_difference_needs_equal_shapes() -> None:
    with pytest.raises(SelectionError, match=r"got the shapes \(2,\) and \(1, 2\)"):
        difference(torch.zeros(2), torch.zeros(1, 2))

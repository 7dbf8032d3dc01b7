"""Denoising against a full singular value decomposition in float64, written from the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from peft_sparse.selection import denoise as module
from peft_sparse.selection.denoise import denoise, denoise_matrix


def oracle(difference: Tensor, *, rank: float, residual_density: float) -> tuple[Tensor, int]:
    """L_r + prune(dW - L_r) by sorting, and r."""
    matrix = difference.double()
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    squares = (s**2).tolist()
    r = min(rank, len(squares)) if isinstance(rank, int) else 1
    if isinstance(rank, float):
        while math.fsum(squares[:r]) < rank * math.fsum(squares) * (1 - 1e-12):
            r += 1
    low = (u[:, :r] * s[:r]) @ vh[:r]
    rest = (matrix - low).flatten()
    # Halves up, at least one where any are asked for.
    count = max(1, math.floor(residual_density * rest.numel() + 0.5)) if residual_density else 0
    kept = sorted(range(rest.numel()), key=lambda i: -abs(float(rest[i])))[:count]
    result = low.flatten().clone()
    result[kept] += rest[kept]
    return result.view_as(matrix), r


def with_spectrum(rows: int, columns: int, spectrum: Tensor, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = len(spectrum)
    u = torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, size, generator=generator, dtype=torch.float64))[0]
    return ((u * spectrum.double()) @ v.T).float()


def decaying(size: int) -> Tensor:
    return torch.arange(1, size + 1).double() ** -0.7


MATRICES = {
    "tall": with_spectrum(90, 17, decaying(17)),
    "wide": with_spectrum(13, 70, decaying(13)),
    "square": with_spectrum(32, 32, decaying(32)),
    "noise": torch.randn(40, 30, generator=torch.Generator().manual_seed(1)),
    "rank-deficient": with_spectrum(40, 24, decaying(6)),
    "ill-conditioned": with_spectrum(40, 24, torch.logspace(0, -7, 24)),
    "tiny": 1e-30 * with_spectrum(20, 24, decaying(20)),
    "one column": torch.randn(20, 1, generator=torch.Generator().manual_seed(2)),
    # The cut falls between clusters: 2, then 2 of them, then the small ones.
    "repeated": with_spectrum(30, 20, torch.tensor([3.0] * 2 + [2.0] * 2 + [0.1] * 16)),
}
RANKS = [0.5, 0.9, 0.99, 1, 2, 4, 1000]
# L_1 of two equal singular values is not defined.
CASES = [(name, rank) for name in MATRICES for rank in RANKS if (name, rank) != ("repeated", 1)]


@pytest.mark.parametrize("block", [2**22, 64])
@pytest.mark.parametrize("residual_density", [0.0, 0.05, 0.4])
@pytest.mark.parametrize(("name", "rank"), CASES)
def test_equals_the_definition(name, rank, residual_density, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    matrix = MATRICES[name]
    expected, r = oracle(matrix, rank=rank, residual_density=residual_density)
    found = denoise_matrix(matrix, rank=rank, residual_density=residual_density)
    if found.rank != r:
        # Directions beyond the matrix's own rank are rounding error.
        assert torch.linalg.matrix_rank(matrix.double()) <= min(r, found.rank)
    assert found.difference.dtype == torch.float32
    # float32 rounds each entry; where the k-th largest entries of the rest differ by less than that, another is kept.
    error = (found.difference.double() - expected).abs() > 1e-6 * matrix.abs().max()
    assert int(error.sum()) == 0
    energy = float(matrix.double().square().sum())
    lost = float((matrix.double() - expected).square().sum())
    assert found.energy == pytest.approx(energy, rel=1e-12)
    assert found.energy_kept == pytest.approx(energy - lost, rel=1e-6)


def test_two_equal_singular_values_on_the_cut_still_give_a_best_approximation():
    matrix = with_spectrum(30, 20, torch.tensor([2.0, 2.0, 2.0, 0.5]))
    found = denoise(matrix, rank=2, residual_density=0.0)
    assert float((matrix - found).double().norm()) == pytest.approx((2.0**2 + 0.5**2) ** 0.5, rel=1e-6)


def test_half_the_energy_of_equal_singular_values_is_half_of_them():
    # Four blocks that are the same: four singular values that are equal but for rounding.
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        block = torch.outer(*torch.randn(2, 3, generator=generator))
        matrix = torch.block_diag(*[block] * 4)[torch.randperm(12, generator=generator)]
        ranks = [denoise_matrix(matrix, rank=share, residual_density=0).rank for share in (0.25, 0.5, 0.75)]
        assert ranks == [1, 2, 3]


def test_singular_values_below_float32_resolution_change_no_entry():
    # Squaring loses what is below 1e-8 of the largest: the price of the Gram matrix, and no more than float32's own.
    matrix = with_spectrum(60, 40, torch.logspace(0, -12, 40))
    for rank in (1, 10, 20, 39):
        expected, _ = oracle(matrix, rank=rank, residual_density=0.0)
        error = (denoise(matrix, rank=rank, residual_density=0.0).double() - expected).abs().max()
        assert error <= 1e-7 * matrix.abs().max()

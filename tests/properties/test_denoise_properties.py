"""Laws of denoising for any matrix, rank and share of the rest."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_sparse.selection.denoise import denoise, denoise_matrix
from peft_sparse.selection.top_k import top_k
from tests.support.laws import examples


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Entries from a continuous distribution, so that two are never as large by design, of any rank and decay."""
    rows, columns, seed = draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    inner = draw(st.integers(1, 24))
    left = torch.randn(rows, inner, generator=generator, dtype=torch.float64)
    right = torch.randn(inner, columns, generator=generator, dtype=torch.float64)
    decay = torch.arange(1, inner + 1, dtype=torch.float64) ** -draw(st.sampled_from([0.0, 0.5, 1.5]))
    return ((left * decay) @ right).float()


ranks = st.one_of(st.sampled_from([0.3, 0.5, 0.9, 0.99]), st.integers(1, 8))
shares = st.sampled_from([0.0, 0.02, 0.1, 0.5])


def close(found: Tensor, expected: Tensor) -> bool:
    return bool(((found - expected).abs() <= 2e-6 * expected.abs().max()).all())


def same_support(found: Tensor, expected: Tensor, k: int) -> None:
    """The k largest are the same, but for scores that rounding may tell apart either way."""
    scores = expected.abs().flatten()
    chosen = set(top_k(found.abs(), k, name="found").tolist())
    differing = chosen ^ set(top_k(scores, k, name="expected").tolist())
    threshold = float(scores.sort(descending=True).values[k - 1]) if k else 0.0
    assert all(abs(float(scores[i]) - threshold) <= 2e-6 * float(scores.max()) for i in differing)


@examples(150)
@given(matrices(), ranks, shares, st.data())
def test_scale_sign_and_transpose_change_nothing(
    matrix: Tensor, rank: float, share: float, data: st.DataObject
) -> None:
    expected = denoise(matrix, rank=rank, residual_density=share)
    k = data.draw(st.integers(1, matrix.numel()))
    scale = data.draw(st.sampled_from([2.0**-20, 2.0**9, 3.0, 1e-6, -1.0, -0.7]))
    scaled = denoise(matrix * scale, rank=rank, residual_density=share) / scale
    turned = denoise(matrix.T, rank=rank, residual_density=share).T
    signs = torch.randint(0, 2, (matrix.shape[0], 1), generator=torch.Generator().manual_seed(k)) * 2.0 - 1
    flipped = denoise(matrix * signs, rank=rank, residual_density=share) * signs
    for found in (scaled, turned, flipped):
        assert close(found, expected)
        same_support(found, expected, k)
    assert torch.equal(denoise(-matrix, rank=rank, residual_density=share), -expected)


@examples(100)
@given(matrices(), ranks, st.data())
def test_nothing_removed_gives_the_support_of_lt_sft(matrix: Tensor, rank: float, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, matrix.numel()))
    expected = top_k(matrix.abs(), k, name="w")
    for request in (
        {"rank": rank, "residual_density": 1},
        {"rank": 1.0, "residual_density": 0.0},
        {"rank": min(matrix.shape), "residual_density": 0.0},
    ):
        assert torch.equal(top_k(denoise(matrix, **request).abs(), k, name="w"), expected)


@examples(100)
@given(matrices(), ranks, shares)
def test_what_is_kept_is_a_better_approximation_the_more_is_kept(matrix: Tensor, rank: float, share: float) -> None:
    alone = denoise_matrix(matrix, rank=rank, residual_density=0.0)
    both = denoise_matrix(matrix, rank=rank, residual_density=share)
    singular = torch.linalg.svdvals(matrix.double())
    best = float((singular[alone.rank :] ** 2).sum())
    total = float((singular**2).sum())
    assert abs(float((matrix - alone.difference).double().square().sum()) - best) <= 1e-6 * total
    assert abs(alone.energy_kept - (total - best)) <= 1e-6 * total
    assert alone.energy_kept <= both.energy_kept <= both.energy * (1 + 1e-12)
    # Nothing is invented: an entry is that of L_r or that of the difference.
    assert bool(((both.difference == alone.difference) | (both.difference == matrix)).all())
    if isinstance(rank, float):
        assert alone.energy_kept >= rank * total * (1 - 1e-9)
        assert alone.rank == 1 or total - float((singular[alone.rank - 1 :] ** 2).sum()) < rank * total * (1 + 1e-9)


def test_threads_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    # Tall: the products run in parallel, while LAPACK on a large matrix would wait long for threads of a busy machine.
    matrix = torch.randn(6000, 20, generator=generator) @ torch.randn(20, 24, generator=generator)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(denoise(matrix, rank=0.8, residual_density=0.05))
    finally:
        torch.set_num_threads(before)
    assert close(found[1], found[0])
    same_support(found[1], found[0], 5000)

"""Denoising: what passes through, what is exact, and what is refused."""

from __future__ import annotations

import pytest
import torch

from peft_sparse import ConfigError, SelectionError
from peft_sparse.selection.denoise import check_denoising, denoise, denoise_matrix


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rank_one_by_hand():
    # Singular values 5 and 1 in the directions (1, 1) and (1, -1), each over the root of 2.
    matrix = torch.tensor([[3.0, 2.0], [2.0, 3.0]])
    low = torch.full((2, 2), 2.5)
    torch.testing.assert_close(denoise(matrix, rank=1, residual_density=0), low)
    torch.testing.assert_close(denoise(matrix, rank=0.96, residual_density=0), low)
    assert torch.equal(denoise(matrix, rank=0.97, residual_density=0), matrix)


def test_the_largest_entries_of_the_rest_come_back_exactly():
    signal = torch.outer(noise(30), noise(20, seed=1))
    spike = torch.zeros(30, 20)
    spike[3, 4], spike[17, 2] = 1.0, -0.7
    matrix = signal + spike
    found = denoise(matrix, rank=1, residual_density=2 / 600)
    assert torch.equal(found[3, 4], matrix[3, 4])
    assert torch.equal(found[17, 2], matrix[17, 2])
    assert int((found == matrix).sum()) == 2


@pytest.mark.parametrize(
    ("rank", "residual_density"), [(1.0, 0.0), (6, 0.0), (99, 0.1), (1, 1), (0.1, 1.0), (0.5, 1)], ids=str
)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_nothing_removed_is_the_difference_bit_for_bit(rank, residual_density, shape):
    matrix = noise(*shape)
    found = denoise_matrix(matrix, rank=rank, residual_density=residual_density)
    assert torch.equal(found.difference, matrix)
    assert found.rank == 6
    assert found.energy_kept == found.energy == pytest.approx(float(matrix.double().square().sum()))


def test_a_rest_that_is_rounding_error_counts_as_nothing():
    # One direction, whose entries span more digits than the decomposition has.
    matrix = torch.outer(2.0 ** -torch.arange(0, 60, 6), 2.0 ** -torch.arange(0, 48, 6))
    for rank in (1, 2, 0.9999):
        assert torch.equal(denoise(matrix, rank=rank, residual_density=0), matrix)


@pytest.mark.parametrize("shape", [(300, 6), (6, 300)])
def test_only_the_smaller_gram_matrix_is_made(shape, monkeypatch):
    sizes = []
    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: sizes.append(tuple(gram.shape)) or original(gram))
    denoise(noise(*shape), rank=2, residual_density=0.1)
    assert sizes == [(6, 6)]


@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (0, 3), (3, 0), (1, 1)])
@pytest.mark.parametrize("rank", [0.9, 1, 2])
def test_a_zero_difference_is_zero(shape, rank):
    found = denoise_matrix(torch.zeros(shape), rank=rank, residual_density=0.1)
    assert torch.equal(found.difference, torch.zeros(shape))
    assert (found.rank, found.energy, found.energy_kept) == (0, 0.0, 0.0)


@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5), (4, 3, 2, 2)])
def test_what_is_no_matrix_passes_through(shape):
    tensor = noise(*shape)
    found = denoise(tensor.bfloat16(), rank=1, residual_density=0)
    assert found.dtype == torch.float32
    assert torch.equal(found, tensor.bfloat16().float())


def test_rows_and_columns_that_did_not_move_get_nothing():
    matrix = noise(12, 8)
    matrix[[2, 7]] = 0
    matrix[:, [1, 5]] = 0
    for one in (matrix, matrix.T):
        found = denoise(one, rank=2, residual_density=0)
        zero = (one == 0).all(1)[:, None] | (one == 0).all(0)[None]
        assert torch.equal(found == 0, zero)


def test_half_precision_and_strided_inputs():
    matrix = noise(12, 8).bfloat16()
    expected = denoise(matrix.float(), rank=2, residual_density=0.1)
    assert torch.equal(denoise(matrix, rank=2, residual_density=0.1), expected)
    strided = matrix.float().T.contiguous().T
    assert torch.equal(denoise(strided, rank=2, residual_density=0.1), expected)
    assert torch.equal(matrix, noise(12, 8).bfloat16())


def test_the_input_is_not_written():
    matrix = noise(12, 8)
    before = matrix.clone()
    denoise(matrix, rank=2, residual_density=0.3)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_difference_that_is_not_finite_is_refused_by_name(bad):
    matrix = noise(4, 3)
    matrix[2, 1] = bad
    with pytest.raises(SelectionError, match=r"q_proj\.weight contains NaN or infinity.*lower the learning rate"):
        denoise(matrix, rank=1, residual_density=0, name="q_proj.weight")


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, 12.0, True, False, "0.9", None, float("nan")])
def test_a_rank_that_is_neither_share_nor_number_is_refused(rank):
    with pytest.raises(ConfigError, match=r"rank must be a float in \(0, 1\].*or an int >= 1.*got .*rank=1\.0.*rank=1"):
        check_denoising(rank=rank, residual_density=0.1)
    with pytest.raises(ConfigError, match="rank must be a float"):
        denoise(noise(3, 3), rank=rank, residual_density=0.1)


@pytest.mark.parametrize("density", [-0.1, 1.1, True, "0.1", None, float("nan")])
def test_a_residual_density_that_is_no_share_is_refused(density):
    with pytest.raises(ConfigError, match=r"residual_density must be in \[0, 1\].*got .*0 keeps the leading"):
        check_denoising(rank=1, residual_density=density)

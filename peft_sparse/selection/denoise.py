"""Denoising: of a difference of weights, its leading singular directions whole, and the largest entries of the rest.

The leading directions come from the eigenvectors of the smaller Gram matrix, in float64: for a [250,002 x 768] matrix
that is [768 x 768], gathered over blocks of rows. Squaring halves the digits that singular values keep, to about 1e-8
of the largest one, which is the resolution of float32 weights; and only the leading ones are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import is_number, is_whole
from ..errors import ConfigError, SelectionError
from .budget import round_density
from .lazy_tensors import LazyTensors
from .top_k import joint_top_k

# Elements that are in float64 at a time: 32 MiB.
_BLOCK = 2**22
# Up to this size LAPACK gets one thread: its many small parallel steps gain little, and where other processes keep the
# cores busy each waits for the slower thread (size 768 on a busy two-core machine: 0.3 s with one, 1 to 30 with two).
_ONE_THREAD = 1024


@dataclass(frozen=True, eq=False)
class Denoised:
    """A denoised difference, and how much of it is left.

    Attributes:
        difference: [O, I] float32.
        rank: r, how many singular directions were kept whole.
        energy: ||dW||_F^2, the squared norm of the difference before.
        energy_kept: how much of that the leading directions and the kept entries of the rest hold.
    """

    difference: Tensor
    rank: int
    energy: float
    energy_kept: float


def check_denoising(*, rank: float, residual_density: float) -> None:
    """Check a request on its own, before any matrix is known.

    Raises:
        ConfigError: `rank` is neither a float in (0, 1] nor an int >= 1, or `residual_density` is outside [0, 1].
    """
    is_count = is_whole(rank) and rank >= 1
    if not is_count and not (isinstance(rank, float) and 0 < rank <= 1):
        raise ConfigError(
            "rank must be a float in (0, 1], the share of the squared singular values to hold, or an int >= 1, the "
            f"number of singular directions, got {rank!r}. The default is rank=0.9; all directions are rank=1.0, one "
            "is rank=1."
        )
    if not is_number(residual_density) or not 0 <= residual_density <= 1:
        raise ConfigError(
            "residual_density must be in [0, 1], the share of the entries outside the leading directions to keep, got "
            f"{residual_density!r}. 0 keeps the leading directions alone."
        )


def denoise(difference: Tensor, *, rank: float, residual_density: float, name: str = "the difference") -> Tensor:
    """Remove from a difference of weights what looks like noise: L_r + prune(dW - L_r).

    L_r is the best approximation of rank r. Of the rest H = dW - L_r, the largest entries are kept in magnitude, and at
    these the sum is dW again, exactly. Where nothing is to be removed the result is dW, bit for bit: residual_density
    1, rank 1.0, r = min(O, I), or an H that is nothing but rounding. So is anything that is not a matrix (biases,
    norms, convolutions, stacks of matrices).

    Args:
        difference: dW [O, I] after training minus before, any floating dtype, taken as float32; subtract bfloat16 and
            float16 weights in float32.
        rank: a float in (0, 1]: r is the smallest number of directions whose squared singular values hold that share of
            ||dW||_F^2. An int >= 1: r itself, at most min(O, I).
        residual_density: share of the entries of H to keep, in [0, 1]; as a number of entries it is rounded as a
            density is, and of equal ones those at the lowest positions are kept.
        name: what errors call the tensor.

    Returns:
        Float32, in the same shape and on the same device; what passes through in float32 shares memory with
        `difference`. Entries of L_r below the rounding error of the decomposition are 0.

    Raises:
        ConfigError: as `check_denoising`.
        SelectionError: the difference contains NaN or infinity.

    The result is a function of the matrix up to rounding: scaling, transposing, another sign or number of threads
    change no entry by more. Two equal singular values on either side of the cut leave L_r undefined; then it is what
    the eigenvectors that LAPACK returns make it.

    Cost: with n = min(O, I), 2 n O I multiplications for the Gram matrix and at most 4 n O I for L_r, in float64; one
    [n, n] eigendecomposition. Memory for one float32 tensor of the size of `difference`, some [n, n] in float64, and a
    block of 2**22 elements.
    Source: Simon and Jyothi 2025, arXiv:2505.15090 (DeFT-X). See `DeftXConfig` for what is known from the paper and
    what is our reading of it.
    """
    check_denoising(rank=rank, residual_density=residual_density)
    if difference.dim() != 2:
        return difference.detach().to(torch.float32)
    return denoise_matrix(difference, rank=rank, residual_density=residual_density, name=name).difference


def denoise_matrix(
    difference: Tensor, *, rank: float, residual_density: float, name: str = "the difference"
) -> Denoised:
    """`denoise` of a matrix, with an account of what was kept. Args, Raises, Cost: as there."""
    check_denoising(rank=rank, residual_density=residual_density)
    if difference.device.type == "mps":  # has no float64
        found = denoise_matrix(difference.cpu(), rank=rank, residual_density=residual_density, name=name)
        return replace(found, difference=found.difference.to(difference.device))
    matrix = difference.detach().to(torch.float32)
    # NaN and infinity show in the extremes, without another tensor of this size.
    extremes = torch.stack(matrix.aminmax()).tolist() if matrix.numel() else [0.0]
    if not all(map(math.isfinite, extremes)):
        raise SelectionError(
            f"{name} contains NaN or infinity, so it has no singular directions; look for a run that diverged "
            "(lower the learning rate, or clip gradients)"
        )
    full = min(matrix.shape)
    keeps_all = residual_density == 1 or (rank >= full if isinstance(rank, int) else rank == 1.0)
    if keeps_all or not any(extremes):
        energy = sum(float(block.square().sum()) for block in _row_blocks(matrix))
        return Denoised(matrix, full if any(extremes) else 0, energy, energy)
    # One side of the matrix is at most as long as the other; the Gram matrix is of that side.
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    leading = _leading_directions(tall, rank)
    if leading.holds_all:
        return Denoised(matrix, leading.rank, leading.energy, leading.energy)
    matrix = matrix.contiguous()
    result = torch.empty_like(matrix)
    _project(tall, leading, out=result if tall.shape == matrix.shape else result.T)
    count = round_density(residual_density, matrix.numel()) if residual_density > 0 else 0
    energy_returned = _return_largest_(result, matrix, count)
    return Denoised(result, leading.rank, leading.energy, leading.energy_held + energy_returned)


@dataclass(frozen=True, eq=False)
class _Leading:
    """The first r right singular directions [n, r] of a matrix, and their squared singular values' sum."""

    directions: Tensor
    energy: float
    energy_held: float
    rounding: float
    largest: float

    @property
    def rank(self) -> int:
        return self.directions.shape[1]

    @property
    def holds_all(self) -> bool:
        """Whether what is left is rounding error."""
        return self.energy_held >= self.energy * (1 - self.rounding)


def _leading_directions(tall: Tensor, rank: float) -> _Leading:
    """Of a [m, n] matrix with m >= n."""
    size = tall.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=tall.device)
    for rows in _row_blocks(tall):
        gram.addmm_(rows.T, rows)
    with _threads(1 if size <= _ONE_THREAD else torch.get_num_threads()):
        ascending, directions = torch.linalg.eigh(gram)
    energies = ascending.flip(0).clamp_min_(0)
    energy = float(gram.trace())
    held = energies.cumsum(0)
    rounding = size * torch.finfo(torch.float64).eps
    # Without the allowance for rounding, half the energy of two equal singular values would at times take both.
    enough = energy * (rank - rounding)
    r = rank if isinstance(rank, int) else min(size, int((held < enough).sum()) + 1)
    return _Leading(
        directions=directions[:, size - r :],
        energy=energy,
        energy_held=float(held[r - 1]),
        rounding=rounding,
        largest=float(energies[0]) ** 0.5,
    )


def _project(tall: Tensor, leading: _Leading, *, out: Tensor) -> None:
    """Write into `out` the part of a matrix that lies in its leading directions."""
    # An entry that is 0 in exact arithmetic must not become a score by rounding.
    rounding_error = leading.rounding * leading.largest
    start = 0
    for rows in _row_blocks(tall):
        part = (rows @ leading.directions) @ leading.directions.T
        out[start : start + rows.shape[0]] = F.hardshrink(part, rounding_error)
        start += rows.shape[0]


def _return_largest_(part: Tensor, matrix: Tensor, count: int) -> float:
    """Put the `count` largest entries of `matrix - part` back into `part`; returns their squared norm."""
    if count == 0:
        return 0.0
    whole, kept = matrix.view(-1), part.view(-1)

    def block(name: str) -> slice:
        return slice(int(name), int(name) + _BLOCK)

    # In blocks, since |matrix - part| as a whole would be one tensor more.
    starts = [str(start) for start in range(0, whole.numel(), _BLOCK)]
    rest = LazyTensors(starts, lambda name: (whole[block(name)] - kept[block(name)]).abs_())
    energy = 0.0
    for name, positions in joint_top_k(rest, count).items():
        chosen = positions.long()
        energy += float(rest[name][chosen].double().square().sum())
        # L + (dW - L) is dW.
        kept[block(name)][chosen] = whole[block(name)][chosen]
    return energy


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _row_blocks(matrix: Tensor) -> Iterator[Tensor]:
    """The rows in float64, some at a time."""
    for rows in matrix.split(max(1, _BLOCK // max(1, matrix.shape[1]))):
        yield rows.double()

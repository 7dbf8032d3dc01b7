"""What ranks the weights of an extraction."""

from __future__ import annotations

from torch import Tensor

from ..errors import ConfigError
from ..selection.anatomy import EMBEDDINGS, place_of
from ..selection.denoise import check_denoising, denoise
from .survey import Criterion

CRITERIA = ("change", "denoised")


def check_criterion(criterion: str, *, rank: float, residual_density: float) -> None:
    """Check a criterion and its options by themselves.

    Raises:
        ConfigError: an unknown name, or an option out of range.
    """
    if criterion not in CRITERIA:
        raise ConfigError(f"criterion must be one of {list(CRITERIA)}, got {criterion!r}.")
    check_denoising(rank=rank, residual_density=residual_density)


def criterion_of(criterion: str, *, rank: float, residual_density: float, denoise_embeddings: bool) -> Criterion:
    """The function of that name: from a difference to scores.

    Args:
        criterion: one of `CRITERIA`.
        rank, residual_density, denoise_embeddings: of "denoised", see `DeftXConfig`.
    """

    def change(difference: Tensor, name: str) -> Tensor:
        return difference.abs()

    def denoised(difference: Tensor, name: str) -> Tensor:
        if place_of(name).part == EMBEDDINGS and not denoise_embeddings:
            return difference.abs()
        return denoise(difference, rank=rank, residual_density=residual_density, name=name).abs()

    return {"change": change, "denoised": denoised}[criterion]

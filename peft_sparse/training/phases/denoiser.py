"""DeFT-X in the dense phase: which of the targets are denoised, and an account of it."""

from __future__ import annotations

import logging
from statistics import median

from torch import Tensor, nn

from ...selection.denoise import denoise_matrix
from ...tuners.sparse_ft.configs.two_phase import DeftXConfig

logger = logging.getLogger(__name__)


class Denoiser:
    """Denoises the differences of a dense phase as a config asks."""

    def __init__(self, config: DeftXConfig) -> None:
        self._config = config
        self._kept: dict[str, tuple[int, float, float]] = {}

    def __call__(self, name: str, module: nn.Module, difference: Tensor) -> Tensor:
        """The denoised difference of one parameter, float32; `difference` itself where it is not to be denoised.

        Args:
            name: of the parameter.
            module: that holds it.
            difference: float32, what the dense phase added to it.

        Raises:
            SelectionError: NaN or infinity in the difference of a matrix.
        """
        if difference.dim() != 2 or (isinstance(module, nn.Embedding) and not self._config.denoise_embeddings):
            return difference
        found = denoise_matrix(
            difference, rank=self._config.rank, residual_density=self._config.residual_density, name=name
        )
        self._kept[name] = (found.rank, found.energy, found.energy_kept)
        logger.debug("denoised %s: rank %d of %d", name, found.rank, min(difference.shape))
        return found.difference

    def log(self) -> None:
        """Say what was kept of the matrices that were denoised."""
        if not self._kept:
            logger.warning(
                "method 'deft_x' found no matrix to denoise among the targets, so it selected as LT-SFT does. Target "
                "linear layers, or set denoise_embeddings=True."
            )
            return
        ranks, energies, kept = zip(*self._kept.values(), strict=True)
        logger.info(
            "denoised %d matrices: ranks %d to %d, median %g; %.1f%% of their squared difference kept",
            len(ranks),
            min(ranks),
            max(ranks),
            median(ranks),
            100 * sum(kept) / (sum(energies) or 1.0),
        )

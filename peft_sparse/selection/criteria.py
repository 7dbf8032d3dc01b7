"""Which: criteria that score weights once, by themselves, by gradients over a few batches, or by how far they moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_one_of
from ..errors import ConfigError
from .anatomy import EMBEDDINGS, place_of
from .denoise import check_denoising, denoise

WEIGHT, MEAN, MEAN_SQUARED = "weight", "mean", "mean_squared"
# How a file names a criterion that somebody else's code computes.
CALLABLE = "callable:"


@dataclass(frozen=True)
class GradientMeans:
    """What is known of the gradients of one tensor.

    Attributes:
        mean: mean over the batches of the gradient of a batch's loss, shape of the tensor; None if not asked for.
        mean_squared: mean of its square, likewise.
        batches: how many.
    """

    mean: Tensor | None
    mean_squared: Tensor | None
    batches: int


@dataclass(frozen=True)
class Criterion:
    """A way to score weights: those with the highest scores are tuned.

    Args:
        score: (weight, gradients) -> scores of the weight's shape, any floating dtype, compared as float32; must not
            change its arguments. What `uses` does not name is None.
        uses: what of "weight", "mean" and "mean_squared" it needs. If that is "weight" alone, the support is chosen as
            soon as the adapter is made.
        min_score: scores must exceed it to be eligible; None: all are.

    Raises:
        ConfigError: `uses` names something else, or nothing.
    """

    score: Callable[[Tensor | None, GradientMeans], Tensor]
    uses: tuple[str, ...] = (WEIGHT, MEAN, MEAN_SQUARED)
    min_score: float | None = None

    def __post_init__(self) -> None:
        known = (WEIGHT, MEAN, MEAN_SQUARED)
        if not self.uses or any(name not in known for name in self.uses):
            raise ConfigError(f"a criterion must use some of {known}, got uses={self.uses!r}")

    @property
    def needs_gradients(self) -> bool:
        """Whether it scores nothing before gradients were seen."""
        return MEAN in self.uses or MEAN_SQUARED in self.uses


def fisher(weight: Tensor | None, gradients: GradientMeans) -> Tensor:
    """The mean squared gradient. With batches of one example, the diagonal of the empirical Fisher information.

    Source: Sung et al. 2021 (FISH mask), arXiv:2111.09839. With larger batches the squares are those of
    their mean gradients, which are smaller where examples disagree.
    """
    return _known(gradients.mean_squared)


def gradient(weight: Tensor | None, gradients: GradientMeans) -> Tensor:
    """|mean gradient|: how fast the loss over all batches falls with the weight."""
    return _known(gradients.mean).abs()


def weight_times_gradient(weight: Tensor | None, gradients: GradientMeans) -> Tensor:
    """|weight * mean gradient|: what removing the weight would change the loss by, to first order.

    Source: Lee et al. 2019 (SNIP), arXiv:1810.02340, where the scores are also divided by their sum: the order stays.
    """
    return (_known(weight) * _known(gradients.mean)).abs()


def largest_weight(weight: Tensor | None, gradients: GradientMeans) -> Tensor:
    """|weight|: one of the two supports of PEFT's Super-Tuning."""
    return _known(weight).abs()


def smallest_weight(weight: Tensor | None, gradients: GradientMeans) -> Tensor:
    """-|weight|: exact zeros come first.

    Source: Liao et al. 2023 (PaFi), arXiv:2305.16742; also the other support of PEFT's Super-Tuning.
    """
    return -_known(weight).abs()


def gradient_on_small_weights(weight: Tensor | None, gradients: GradientMeans) -> Tensor:
    """|mean gradient| / (|weight| + a tenth of the weights' root mean square): large gradients on small weights.

    Source: the idea of GaLLoP, arXiv:2510.19778; the formula is ours. Measured no better than "gradient" so far.
    """
    known = _known(weight).float()
    return _known(gradients.mean).abs().float() / (known.abs() + 0.1 * known.square().mean().sqrt()).clamp_min(1e-30)


# Of the matrix that `low_rank_weight` looks at.
LOW_RANK = 128


def low_rank_weight(weight: Tensor | None, gradients: GradientMeans) -> Tensor:
    """|entry| of the weight's best approximation of rank 128; of a vector, or a matrix no larger, |weight|.

    Cost: a singular value decomposition per matrix, and three where budgets are joint.
    Source: LIFT, arXiv:2506.00772, which selects anew every few hundred updates.
    """
    known = _known(weight)
    if known.dim() < 2 or min(known.shape[0], known.numel() // known.shape[0]) <= LOW_RANK:
        return known.abs()
    u, s, v = torch.linalg.svd(known.float().flatten(1), full_matrices=False)
    return ((u[:, :LOW_RANK] * s[:LOW_RANK]) @ v[:LOW_RANK]).abs().view(known.shape)


# A weight whose gradient is zero in every batch (the row of a token that occurred in none) has nothing to show for
# itself, as one that did not move has not in LT-SFT: it is not eligible. Of magnitudes any is as good as another.
CRITERIA: dict[str, Criterion] = {
    "fisher": Criterion(fisher, (MEAN_SQUARED,), min_score=0.0),
    "gradient": Criterion(gradient, (MEAN,), min_score=0.0),
    "weight_times_gradient": Criterion(weight_times_gradient, (WEIGHT, MEAN), min_score=0.0),
    "gradient_on_small_weights": Criterion(gradient_on_small_weights, (WEIGHT, MEAN), min_score=0.0),
    "low_rank_weight": Criterion(low_rank_weight, (WEIGHT,)),
    "largest_weight": Criterion(largest_weight, (WEIGHT,)),
    "smallest_weight": Criterion(smallest_weight, (WEIGHT,)),
}


def check_criterion(criterion: object) -> None:
    """Check a criterion as a config or a file may hold it.

    Raises:
        ConfigError: neither a known name, nor that of a callable in a file, nor a callable.
    """
    is_name = isinstance(criterion, str) and (criterion in CRITERIA or criterion.startswith(CALLABLE))
    if not (is_name or isinstance(criterion, Criterion) or callable(criterion)):
        raise ConfigError(
            f"criterion must be one of {sorted(CRITERIA)}, a Criterion, or a function (weight, gradients) -> scores, "
            f"got {criterion!r}"
        )


def resolve_criterion(criterion: str | Criterion | Callable[..., Tensor]) -> Criterion:
    """What a config's `criterion` stands for; a plain function is given all that there is.

    Raises:
        ConfigError: as `check_criterion`; or it is a file's name for a callable, which nothing here imports.
    """
    check_criterion(criterion)
    if isinstance(criterion, Criterion):
        return criterion
    if not isinstance(criterion, str):
        return Criterion(criterion)
    if criterion in CRITERIA:
        return CRITERIA[criterion]
    raise ConfigError(
        f"criterion={criterion!r} is how a file names the function that its author scored with. An adapter that has "
        "its weights does not need it; to select anew, give the function itself: OneShotConfig(criterion=function)"
    )


def criterion_name(criterion: str | Criterion | Callable[..., Tensor]) -> str:
    """How a file names a criterion: its name, or "callable:" and where its function was defined."""
    if isinstance(criterion, str):
        return criterion
    named = next((name for name, known in CRITERIA.items() if known is criterion), None)
    if named is not None:
        return named
    function: Any = criterion.score if isinstance(criterion, Criterion) else criterion
    owner = function if hasattr(function, "__qualname__") else type(function)
    return f"{CALLABLE}{owner.__module__}.{owner.__qualname__}"


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # the criterion's `uses` names it
    return tensor


# ---- of two states of a weight -------------------------------------------------------------------

# {name: difference between two states of a weight, name of the parameter, how to denoise -> scores of its shape}; the
# difference is not changed.
CHANGES: dict[str, Callable[[Tensor, str, Denoising], Tensor]] = {
    "change": lambda difference, name, denoising: difference.abs(),
    "denoised": lambda difference, name, denoising: denoising(difference, name).abs(),
}


@dataclass(frozen=True)
class Denoising:
    """How differences are denoised before they are ranked: the options of DeFT-X, see `DeftXConfig`.

    Raises:
        ConfigError: an option out of range.
    """

    rank: float | int = 0.9
    residual_density: float = 0.05
    denoise_embeddings: bool = False

    def __post_init__(self) -> None:
        check_denoising(rank=self.rank, residual_density=self.residual_density)

    def __call__(self, difference: Tensor, name: str) -> Tensor:
        """The difference of a parameter, denoised; itself if it is not to be."""
        if place_of(name).part == EMBEDDINGS and not self.denoise_embeddings:
            return difference
        return denoise(difference, rank=self.rank, residual_density=self.residual_density, name=name)


def change_criterion(criterion: str, denoising: Denoising) -> Callable[[Tensor, str], Tensor]:
    """The criterion of a name for two states of a weight: (difference, parameter name) -> scores.

    Raises:
        ConfigError: an unknown name.
    """
    check_one_of("criterion", criterion, CHANGES)
    score = CHANGES[criterion]
    return lambda difference, name: score(difference, name, denoising)

"""Configs of the methods whose support a dense phase chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ....checks import check_flag
from ....selection.denoise import check_denoising
from .base import DENSE_PHASE, SparseConfig, method_name


@method_name("lottery_ticket")
@dataclass
class LotteryTicketConfig(SparseConfig):
    """LT-SFT: train densely, keep the K weights that moved most, rewind, train those.

    Train with `SparseTrainer` (or `sparse_trainer(YourTrainer)`), or call `start_dense_phase` in a loop of your own:
    until the dense phase has chosen the support, the adapter holds no weight. The default budget is the paper's: one
    joint selection over all targets.

    Source: Ansell et al. 2022, arXiv:2110.07560, section 3; thesis chapter 4. Differs from the authors' code in:
    exactly K weights (ties go to the lowest index), each phase has its own learning rate and length, and fewer than K
    moved weights are an error.
    """

    method: str = field(default="lottery_ticket", metadata={"help": "How the weights to tune are chosen."})
    budget: str | dict[str, float] = field(
        default="global",
        metadata={"help": "How the total is spread over tensors: 'uniform', 'global' or {regex: share}."},
    )

    selected_by: ClassVar[str] = DENSE_PHASE


@method_name("deft_x")
@dataclass
class DeftXConfig(LotteryTicketConfig):
    """DeFT-X: LT-SFT whose K weights are chosen after the difference that they are chosen by has been denoised.

    The dense phase is that of LT-SFT. Then each matrix of the difference dW keeps its r leading singular directions
    whole, and of the rest only the largest entries; the K weights with the largest denoised difference are tuned, from
    their pretrained values. Training, saving and composing are those of `LotteryTicketConfig`.

    A weight's denoised difference can be non-zero where the weight itself did not move, through its row and column. It
    is the denoised one that counts here: fewer than K non-zero ones are an error, and a matrix that did not move at all
    offers none.

    Args:
        rank: a float in (0, 1]: for each matrix the smallest r whose squared singular values hold this share of
            ||dW||_F^2. An int >= 1: r for every matrix, at most its smaller side. 1.0 keeps everything, which is
            LT-SFT; 1 keeps a single direction.
        residual_density: share of the entries of the rest dW - L_r that is kept, the largest in magnitude, in [0, 1];
            1 is LT-SFT, 0 leaves the leading directions alone.
        denoise_embeddings: denoise embedding matrices as well. Everything else that is not a matrix (biases, norms,
            convolutions, stacks of experts) is scored as in LT-SFT.

    Source: Simon and Jyothi 2025, arXiv:2505.15090, Findings of EMNLP 2025. We could read its abstract and figure
    caption and others' summaries, not its equations and appendix, and no code of it was found. Known from these: the
    difference of a dense phase is decomposed matrix by matrix, large singular values are signal and small ones noise,
    the rank comes from 90 % of the variance or is one number for all matrices, the top K of the result are tuned from
    pretrained values, and sparse fine-tunings are added up. Reported by one summary: the small part is pruned by
    magnitude and added back. Our reading: variance is the sum of squared singular values, embeddings and what is not a
    matrix stay as they are. Not known: the share of the small part that the authors keep (0.05 is our choice, not
    tuned), and their uniform ranks.
    """

    method: str = field(default="deft_x", metadata={"help": "How the weights to tune are chosen."})
    rank: float | int = field(
        default=0.9, metadata={"help": "Share of the squared singular values to keep (float), or how many (int)."}
    )
    residual_density: float = field(
        default=0.05, metadata={"help": "Share of the entries outside the leading directions to keep."}
    )
    denoise_embeddings: bool = field(default=False, metadata={"help": "Denoise embedding matrices as well."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_denoising(rank=self.rank, residual_density=self.residual_density)
        check_flag("denoise_embeddings", self.denoise_embeddings)

    @staticmethod
    def card_facts(config: Mapping[str, Any]) -> list[str]:
        """How the difference was denoised."""
        rank = config.get("rank")
        meaning = "directions" if isinstance(rank, int) else "of the squared singular values"
        embeddings = "embeddings too" if config.get("denoise_embeddings") else "embeddings as they were"
        kept = f"rank {rank} ({meaning} of each matrix), residual density {config.get('residual_density')}"
        return [f"Denoised before the choice: {kept}, {embeddings}"]

"""Configs of the methods whose support a dense phase chooses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .config import DENSE_PHASE, SparseConfig, method_name


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

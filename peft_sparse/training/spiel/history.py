"""What the reselections of an adapter did, in its history and in the log."""

from __future__ import annotations

import logging
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reselection:
    """What one reselection did.

    Attributes:
        update: after which optimizer update, counted from 1.
        share_replaced: of all tuned weights.
        mean_age: updates since a weight was last grown, mean over all tuned weights after the reselection.
        mean_abs_delta: mean |value| before it.
    """

    update: int
    share_replaced: float
    mean_age: float
    mean_abs_delta: float


def log_reselection(adapter_name: str, done: Reselection, *, total: int) -> None:
    """Log a reselection of an adapter that has `total` weights."""
    logger.info(
        "reselection of %r after update %d: %.2f%% of %d weights replaced, mean age %.1f, mean |delta| %.3g",
        adapter_name,
        done.update,
        100 * done.share_replaced,
        total,
        done.mean_age,
        done.mean_abs_delta,
    )


def warn_without_total(adapter_name: str, rate: float) -> None:
    """Say that the rate of reselection cannot fall towards the end of a run of unknown length."""
    logger.warning(
        "The reselection rate of adapter %r stays at %s, for the length of the training is not known. Give "
        "total_steps=... in its config (a Hugging Face trainer sets it).",
        adapter_name,
        rate,
    )


def warn_without_candidates(adapter_name: str, update: int, *, overflowed: bool) -> None:
    """Say that a reselection had nothing to grow."""
    logger.warning(
        "No gradient of adapter %r was seen in the window before update %d (%s): no weight was replaced.",
        adapter_name,
        update,
        "all held NaN or infinity" if overflowed else "the loss did not depend on it",
    )

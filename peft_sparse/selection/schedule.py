"""When: at which updates a dynamic method reselects, when it estimates gradients for that, and how much it replaces."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import cos, floor, pi

from ..checks import as_decimal, check_share, check_whole
from ..errors import ConfigError

KINDS = ("linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The calendar of SpIEL's reselections: a pure function of the number of optimizer updates.

    Updates are counted from 1. With gamma = `estimation_steps` and S = `reselection_steps`, support is reselected after
    the updates gamma, gamma + S, gamma + 2S, ..., and the gamma updates up to and including each of these are its
    estimation window. Skipped updates (a gradient scaler that found an overflow) do not count.

    No reselection follows the last update, whose new weights would stay zero, nor any update above
    `reselection_until` * `total_steps`; there is no window without a reselection at its end.

    Args:
        reselection_steps: S, updates between reselections.
        estimation_steps: gamma, updates in a window, 1 <= gamma <= S.
        initial_rate: xi in (0, 1], the share of a tensor's tuned weights that is replaced at the start.
        kind: how the rate decays over training: "linear", xi * (1 - t / T), or "cosine", xi / 2 * (1 + cos(pi t / T)).
        replace_all_first: the first reselection replaces every weight, since the first support is random.
        reselection_until: share of training in (0, 1] after which the support stays.
        total_steps: T, the number of updates of the whole training. If None the rate stays at xi, and
            `reselection_until` and the rule on the last update have no effect.

    Raises:
        ConfigError: a value out of range.

    Source: Ansell et al. 2024, arXiv:2401.16405; thesis 7.3.1, eq. 7.6, and E.1. The authors' windows have one update
    more from the second on, their last reselection may fall on the last update, and their cosine rate never replaces
    all weights at first.
    """

    reselection_steps: int = 20
    estimation_steps: int = 5
    initial_rate: float = 0.2
    kind: str = "linear"
    replace_all_first: bool = True
    reselection_until: float = 1.0
    total_steps: int | None = None

    def __post_init__(self) -> None:
        for field in ("reselection_steps", "estimation_steps", "total_steps"):
            value = getattr(self, field)
            if value is None and field == "total_steps":
                continue
            check_whole(field, value, way_out="It counts optimizer updates")
        if self.estimation_steps > self.reselection_steps:
            raise ConfigError(
                f"estimation_steps must be <= reselection_steps ({self.reselection_steps}), got "
                f"{self.estimation_steps}: windows must not overlap. Shorten the window or reselect less often"
            )
        for field in ("initial_rate", "reselection_until"):
            check_share(field, getattr(self, field), way_out="It is a share, not a count")
        if self.kind not in KINDS:
            raise ConfigError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {self.kind!r}")

    def selects_after(self, update: int) -> bool:
        """Whether the support is reselected after this update."""
        if update < self.estimation_steps or (update - self.estimation_steps) % self.reselection_steps:
            return False
        if self.total_steps is None:
            return True
        return update < self.total_steps and update <= as_decimal(self.reselection_until) * self.total_steps

    def window_end(self, update: int) -> int | None:
        """The last update of the estimation window that this update belongs to; None outside of windows."""
        to_end = (self.estimation_steps - update) % self.reselection_steps
        if update < 1 or to_end >= self.estimation_steps or not self.selects_after(update + to_end):
            return None
        return update + to_end

    def in_window(self, update: int) -> bool:
        """Whether this update's gradients are part of an estimate."""
        return self.window_end(update) is not None

    def is_first_of_window(self, update: int) -> bool:
        """Whether this update's first backward pass nominates the candidates."""
        return self.window_end(update) == update + self.estimation_steps - 1

    def rate(self, update: int) -> float:
        """Share of a tensor's weights that the reselection after this update replaces, in [0, 1]."""
        return float(self._rate(update))

    def num_replaced(self, update: int, count: int) -> int:
        """How many of `count` weights the reselection after this update drops and grows: rate * count, rounded down.

        The linear rate is computed exactly, from the decimal number that `initial_rate` prints as: 0.2 of 35 is 7.
        """
        return floor(self._rate(update) * count)

    def _rate(self, update: int) -> Fraction | float:
        if self.replace_all_first and update == self.estimation_steps:
            return Fraction(1)
        if self.total_steps is None:
            return as_decimal(self.initial_rate)
        progress = Fraction(min(update, self.total_steps), self.total_steps)
        if self.kind == "linear":
            return as_decimal(self.initial_rate) * (1 - progress)
        return self.initial_rate / 2 * (1 + cos(pi * progress))

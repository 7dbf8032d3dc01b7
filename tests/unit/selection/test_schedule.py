"""The calendar of reselections."""

from __future__ import annotations

from math import cos, pi
from typing import Any

import pytest

from peft_sparse.errors import ConfigError
from peft_sparse.selection.schedule import Schedule


def selections(schedule: Schedule, until: int) -> list[int]:
    return [update for update in range(1, until + 1) if schedule.selects_after(update)]


def test_selects_after_gamma_and_then_every_s_updates() -> None:
    assert selections(Schedule(total_steps=100), 120) == [5, 25, 45, 65, 85]
    assert selections(Schedule(reselection_steps=3, estimation_steps=1, total_steps=10), 10) == [1, 4, 7]


def test_every_window_has_gamma_updates_and_ends_in_a_selection() -> None:
    schedule = Schedule(total_steps=70)
    assert [u for u in range(1, 80) if schedule.in_window(u)] == [
        *range(1, 6),
        *range(21, 26),
        *range(41, 46),
        *range(61, 66),
    ]
    assert [u for u in range(1, 80) if schedule.is_first_of_window(u)] == [1, 21, 41, 61]
    assert [schedule.window_end(u) for u in (1, 5, 6, 20, 21, 64, 66)] == [5, 5, None, None, 25, 65, None]


def test_no_selection_after_the_last_update_and_no_window_for_it() -> None:
    schedule = Schedule(total_steps=45)
    assert selections(schedule, 60) == [5, 25]
    assert not any(schedule.in_window(update) for update in range(26, 60))
    assert selections(Schedule(total_steps=46), 60) == [5, 25, 45]


def test_windows_may_touch() -> None:
    schedule = Schedule(reselection_steps=4, estimation_steps=4, total_steps=13)
    assert selections(schedule, 13) == [4, 8, 12]
    assert [u for u in range(1, 14) if schedule.in_window(u)] == list(range(1, 13))
    assert [u for u in range(1, 14) if schedule.is_first_of_window(u)] == [1, 5, 9]


def test_until_ends_reselection() -> None:
    assert selections(Schedule(total_steps=100, reselection_until=0.45), 100) == [5, 25, 45]
    assert selections(Schedule(total_steps=100, reselection_until=0.4499), 100) == [5, 25]


def test_without_a_total_it_goes_on_at_the_first_rate() -> None:
    schedule = Schedule(reselection_until=0.1, initial_rate=0.3)
    assert selections(schedule, 50) == [5, 25, 45]
    assert [schedule.rate(update) for update in (5, 25, 100_005)] == [1.0, 0.3, 0.3]


def test_linear_rate() -> None:
    schedule = Schedule(total_steps=100)
    assert schedule.rate(5) == 1.0
    assert schedule.rate(25) == pytest.approx(0.15, abs=1e-15)
    assert schedule.num_replaced(5, 1000) == 1000
    assert schedule.num_replaced(25, 1000) == 150
    assert schedule.num_replaced(85, 10) == 0  # 0.3 weights


def test_cosine_rate() -> None:
    schedule = Schedule(total_steps=100, kind="cosine", replace_all_first=False)
    assert schedule.rate(5) == pytest.approx(0.1 * (1 + cos(0.05 * pi)))
    assert schedule.rate(85) == pytest.approx(0.1 * (1 + cos(0.85 * pi)))
    assert schedule.num_replaced(45, 1000) == 115  # 115.64
    assert Schedule(total_steps=100, kind="cosine").rate(5) == 1.0


def test_counts_are_exact_where_floats_are_not() -> None:
    # 0.1 * (1 - 3 / 10) * 100 is 7, but 6.999... in floats.
    schedule = Schedule(
        initial_rate=0.1, total_steps=10, estimation_steps=1, reselection_steps=2, replace_all_first=False
    )
    assert int(0.1 * (1 - 3 / 10) * 100) == 6
    assert schedule.num_replaced(3, 100) == 7
    assert Schedule(initial_rate=0.29).num_replaced(25, 100) == 29


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"estimation_steps": 21},
            r"estimation_steps must be <= reselection_steps \(20\), got 21.*reselect less often",
        ),
        ({"estimation_steps": 0}, "estimation_steps must be an int >= 1, got 0"),
        ({"reselection_steps": 2.5}, "reselection_steps must be an int >= 1, got 2.5"),
        ({"reselection_steps": True}, "reselection_steps must be an int >= 1, got True"),
        ({"total_steps": 0}, "total_steps must be an int >= 1, got 0"),
        ({"initial_rate": 20}, r"initial_rate must be in \(0, 1\], got 20. It is a share"),
        ({"initial_rate": float("nan")}, r"initial_rate must be in \(0, 1\], got nan"),
        ({"reselection_until": 0}, r"reselection_until must be in \(0, 1\], got 0"),
        ({"kind": "constant"}, "kind must be one of 'linear', 'cosine', got 'constant'"),
    ],
)
def test_errors_name_field_value_and_rule(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(**fields)

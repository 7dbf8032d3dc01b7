"""Drop and grow for any support, scores and candidates, against sets and sorting."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse.core.indices import check_indices
from peft_sparse.selection.replacement import Candidates, drop_and_grow, redistribute
from peft_sparse.selection.schedule import Schedule
from tests.support.laws import examples

NUMEL = 40
# Few values, so that ties are the rule.
scores = st.one_of(st.sampled_from([0.0, -0.0, 1.0, 2.0, float("inf")]), st.floats(0, 10, width=32))
Scored = dict[int, float]
tuned = st.dictionaries(st.integers(0, NUMEL - 1), scores, max_size=14)


class Expected(NamedTuple):
    supports: list[list[int]]
    grown: list[list[int]]


def by_sets(weak: list[Scored], strong: list[Scored], num: int) -> Expected:
    """Pairs (tensor, index), sets and stable sorts."""
    active = {(t, i): s for t, scored in enumerate(weak) for i, s in scored.items()}
    drop = sorted(active, key=lambda w: (active[w], w))[:num]
    offered = {(t, i): s for t, scored in enumerate(strong) for i, s in scored.items()}
    for w in active.keys() - set(drop):
        offered.pop(w, None)
    grow = sorted(offered, key=lambda w: (-offered[w], w))[:num]
    entering = [w for w in grow if w not in drop]
    leaving = [w for w in drop if w not in grow][: len(entering)]
    support = active.keys() - set(leaving) | set(entering)
    return Expected(
        [sorted(i for t, i in support if t == tensor) for tensor in range(len(weak))],
        [sorted(i for t, i in entering if t == tensor) for tensor in range(len(weak))],
    )


def tensors(scored: Scored) -> tuple[torch.Tensor, torch.Tensor]:
    indices = sorted(scored)
    values = torch.tensor([scored[i] for i in indices], dtype=torch.float32)
    return torch.tensor(indices, dtype=torch.int32), values


@examples(300)
@given(tuned, tuned, st.data())
def test_one_tensor(weak: Scored, strong: Scored, data: st.DataObject) -> None:
    num = data.draw(st.integers(0, len(weak)))
    indices, drop_scores = tensors(weak)
    result = drop_and_grow(indices, drop_scores, Candidates(*tensors(strong)), num_replaced=num)
    expected = by_sets([weak], [strong], num)
    check_indices(result.indices, NUMEL, name="w")
    assert result.indices.tolist() == expected.supports[0]
    assert result.new_indices.tolist() == expected.grown[0]
    assert result.num_dropped == result.num_grown <= num


@examples(200)
@given(st.lists(st.tuples(tuned, tuned), min_size=1, max_size=4), st.data())
def test_several_tensors(pairs: list[tuple[Scored, Scored]], data: st.DataObject) -> None:
    weak, strong = [list(side) for side in zip(*pairs, strict=True)]
    num = data.draw(st.integers(0, sum(map(len, weak))))
    supports = {str(t): tensors(scored) for t, scored in enumerate(weak)}
    result = redistribute(
        {name: indices for name, (indices, _) in supports.items()},
        {name: drop_scores for name, (_, drop_scores) in supports.items()},
        {str(t): Candidates(*tensors(scored)) for t, scored in enumerate(strong)},
        num_replaced=num,
    )
    expected = by_sets(weak, strong, num)
    assert [r.indices.tolist() for r in result.values()] == expected.supports
    assert [r.new_indices.tolist() for r in result.values()] == expected.grown
    assert sum(r.count for r in result.values()) == sum(map(len, weak))


@examples(200)
@given(tuned, tuned, st.data())
def test_everything_is_carried_with_its_weight(weak: Scored, strong: Scored, data: st.DataObject) -> None:
    num = data.draw(st.integers(0, len(weak)))
    indices, drop_scores = tensors(weak)
    offered = Candidates(*tensors(strong))
    result = drop_and_grow(indices, drop_scores, offered, num_replaced=num)
    names = {i: 1000 + i for i in weak}
    carried = result.carry(torch.tensor([names[i] for i in sorted(weak)]), -offered.indices[result.candidates])
    grown = set(result.new_indices.tolist())
    assert carried.tolist() == [-i if i in grown else names[i] for i in result.indices.tolist()]
    assert set(indices[result.dropped].tolist()) == set(weak) - set(result.indices.tolist())


@examples(300)
@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.one_of(st.none(), st.integers(1, 200)),
    st.floats(0, 1, exclude_min=True),
    st.sampled_from(["linear", "cosine"]),
    st.floats(0, 1, exclude_min=True),
)
def test_schedules(gamma: int, more: int, total: int | None, until: float, kind: str, rate: float) -> None:
    schedule = Schedule(
        estimation_steps=gamma,
        reselection_steps=gamma + more - 1,
        total_steps=total,
        reselection_until=until,
        kind=kind,
        initial_rate=rate,
    )
    updates = range(1, 260)
    selections = [update for update in updates if schedule.selects_after(update)]
    windows = {update for update in updates if schedule.in_window(update)}
    assert windows == {
        u for s in (*selections, *_beyond(schedule)) for u in range(s - gamma + 1, s + 1) if u in updates
    }
    assert all(schedule.is_first_of_window(s - gamma + 1) for s in selections)
    assert sum(map(schedule.is_first_of_window, updates)) - len(selections) in (0, 1)
    for update in selections:
        assert total is None or update < total
        assert 0 <= schedule.num_replaced(update, 1000) <= 1000
        assert schedule.num_replaced(update, 0) == 0
    rates = [schedule.rate(update) for update in selections[1:]]
    assert rates == sorted(rates, reverse=True)
    assert all(r <= rate for r in rates)


def _beyond(schedule: Schedule) -> list[int]:
    """Selections whose window begins inside the range and ends after it."""
    return [update for update in range(260, 260 + schedule.estimation_steps) if schedule.selects_after(update)]

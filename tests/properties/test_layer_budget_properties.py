"""Layer budgets, draws and shortlists, for any model."""

from __future__ import annotations

import re

import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse.selection.budget import bernoulli_counts, groups_of
from peft_sparse.selection.layer_budgets import LAYER_BUDGETS, measured_shares, zones_of
from peft_sparse.selection.random import bernoulli_count
from peft_sparse.selection.shortlist import Shortlist
from peft_sparse.selection.top_k import joint_top_k
from tests.support.laws import examples

INSIDE = ["attn.q.weight", "attn.q.bias", "mlp.up.weight", "norm.weight"]
OUTSIDE = ["embed_tokens.weight", "embeddings.LayerNorm.bias", "final_norm.weight", "pooler.dense.weight", "weight"]
STACKS = ["layers", "encoder.layer", "decoder.layer", "h"]


@st.composite
def models(draw: st.DrawFn, fewest_layers: int = 1) -> dict[str, int]:
    """{parameter: size} of some stacks of layers, and things outside of them."""
    names = []
    for stack in draw(st.lists(st.sampled_from(STACKS), min_size=1, max_size=3, unique=True)):
        inside = draw(st.lists(st.sampled_from(INSIDE), min_size=1, unique=True))
        depth = draw(st.integers(fewest_layers, 30))
        names += [f"{stack}.{i}.{name}" for i in range(depth) for name in inside]
    names += draw(st.lists(st.sampled_from(OUTSIDE), unique=True))
    sizes = draw(st.lists(st.integers(1, 50), min_size=len(names), max_size=len(names)))
    return dict(zip(draw(st.permutations(names)), sizes, strict=True))


@examples(100)
@given(models(fewest_layers=3), st.sampled_from(list(LAYER_BUDGETS)), st.integers(0, 200))
def test_ready_made_budgets_partition_any_model(sizes: dict[str, int], budget: str, total: int) -> None:
    zones = zones_of(budget, sizes)
    assert sorted(name for zone in zones for name in zone.members) == sorted(sizes)
    assert sum(zone.share for zone in zones) == 1
    assert all(zone.share > 0 and zone.members for zone in zones)
    large = {name: size * 1000 for name, size in sizes.items()}
    groups = groups_of(budget, total, large)
    assert sum(group.count for group in groups) == total
    for group, zone in zip(groups, zones, strict=True):
        assert abs(group.count - zone.share * total) < 1


@examples(150)
@given(models(), st.data())
def test_a_measured_budget_gives_back_the_distribution_it_measured(sizes: dict[str, int], data: st.DataObject) -> None:
    counts = {
        name: data.draw(st.integers(0, size) if data.draw(st.booleans()) else st.just(0))
        for name, size in sizes.items()
    }
    if not any(counts.values()):
        return
    shares = measured_shares(counts)
    assert abs(sum(shares.values()) - 1) < 1e-9
    patterns = [re.compile(pattern) for pattern in shares]
    assert all(sum(bool(pattern.search(name)) for pattern in patterns) == 1 for name in sizes)
    groups = groups_of(shares, sum(counts.values()), sizes)
    assert [group.count for group in groups] == [sum(counts[name] for name in group.members) for group in groups]


@examples(100)
@given(models(), st.integers(0, 2**64), st.data())
def test_bernoulli_counts_fit_and_repeat(sizes: dict[str, int], seed: int, data: st.DataObject) -> None:
    groups = groups_of("global", data.draw(st.integers(0, sum(sizes.values()))), sizes)
    counts = bernoulli_counts(groups, sizes, seed=seed)
    assert list(counts) == list(sizes)
    assert all(0 <= counts[name] <= sizes[name] for name in sizes)
    # A tensor's count is its own affair: the others may come in any order, or be named otherwise.
    name = next(iter(sizes))
    share = groups[0].count / sum(sizes.values())
    assert counts[name] == bernoulli_count(sizes[name], share, seed=seed, name=name)


floats = st.one_of(st.sampled_from([0.0, 1.0, -1.0, float("inf")]), st.floats(width=32, allow_nan=False))


@examples(150)
@given(st.lists(st.lists(floats, max_size=12), min_size=1, max_size=6), st.data())
def test_a_shortlist_of_parts_equals_the_joint_top_k(parts: list[list[float]], data: st.DataObject) -> None:
    scores = {f"p{i}": torch.tensor(part, dtype=torch.float32) for i, part in enumerate(parts)}
    k = data.draw(st.integers(0, sum(map(len, parts))))
    shortlist, left = Shortlist(k, name="g"), list(scores)
    while left:
        taken = data.draw(st.integers(1, len(left)))
        shortlist.add({name: scores[name] for name in left[:taken]})
        left = left[taken:]
    found, expected = shortlist.select(), joint_top_k(scores, k)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name])

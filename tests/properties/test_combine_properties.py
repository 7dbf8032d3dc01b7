"""Combining deltas: what holds for any supports, values and weights."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_sparse.composition.combine import COMBINATIONS, combine
from peft_sparse.core.delta import SparseDelta
from tests.support.laws import examples

values_ = st.floats(-1e6, 1e6, width=32)


@st.composite
def deltas(draw: st.DrawFn) -> SparseDelta:
    """A delta on a weight of 4 x 5, of any size."""
    entries = draw(st.dictionaries(st.integers(0, 19), values_, max_size=20))
    indices = sorted(entries)
    chosen = [entries[i] for i in indices]
    return SparseDelta(torch.tensor(indices, dtype=torch.int32), torch.tensor(chosen, dtype=torch.float32), (4, 5))


@examples(200)
@given(st.lists(st.tuples(deltas(), st.floats(-4, 4)), min_size=1, max_size=4), st.randoms())
def test_linear_is_the_dense_sum_and_commutes(parts: list[tuple[SparseDelta, float]], random: object) -> None:
    chosen, weights = [delta for delta, _ in parts], [weight for _, weight in parts]
    result = combine(chosen, weights, "linear").check()
    assert set(result.indices.tolist()) == {i for delta in chosen for i in delta.indices.tolist()}
    exact = sum(weight * delta.to_dense(dtype=torch.float64) for delta, weight in parts)
    torch.testing.assert_close(result.to_dense(), torch.as_tensor(exact).float(), rtol=1.2e-7, atol=1e-8)
    shuffled = list(parts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = combine([delta for delta, _ in shuffled], [weight for _, weight in shuffled], "linear")
    assert torch.equal(again.indices, result.indices)
    assert torch.equal(again.values, result.values)


@examples(200)
@given(st.lists(deltas(), min_size=1, max_size=4), st.sampled_from(sorted(COMBINATIONS)), st.floats(0.05, 1.0))
def test_supports_only_shrink_and_stay_sorted(chosen: list[SparseDelta], kind: str, density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    options = {} if kind == "linear" else {"density": density}
    result = combine(chosen, [1.0] * len(chosen), kind, generator=generator, **options).check()
    assert set(result.indices.tolist()) <= {i for delta in chosen for i in delta.indices.tolist()}
    assert result.shape == (4, 5)


@examples(100)
@given(deltas(), st.integers(1, 4), st.sampled_from(["ties", "dare_ties"]))
def test_ties_of_equal_adapters_is_that_adapter(delta: SparseDelta, copies: int, kind: str) -> None:
    result = combine([delta] * copies, [1.0] * copies, kind, density=1.0)
    assert torch.equal(result.to_dense(), delta.to_dense())

"""Combining deltas: every type against a dense float64 oracle, position by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.utils import merge_utils

from peft_sparse.composition import combine as module
from peft_sparse.composition.combine import COMBINATIONS, combine
from peft_sparse.core.delta import SparseDelta
from peft_sparse.errors import ConfigError

SHAPE = (12, 10)
PRUNING = [name for name in COMBINATIONS if name != "linear"]


def random_deltas(count: int = 3, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[SparseDelta]:
    """Overlapping deltas of different sizes, with ties in magnitude and opposite signs."""
    generator = torch.Generator().manual_seed(seed)
    deltas = []
    for size in (35, 50, 20, 41)[:count]:
        indices = torch.randperm(120, generator=generator)[:size].sort().values.int()
        values = (torch.randn(size, generator=generator) * 4).round() / 4
        values[values == 0] = 0.25
        deltas.append(SparseDelta(indices, values.to(dtype), SHAPE))
    return deltas


def oracle(
    deltas: list[SparseDelta],
    weights: list[float],
    kind: str,
    *,
    density: float = 1.0,
    method: str = "total",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The same in dense float64, one position after the other."""
    dense = []
    for delta in deltas:
        full = torch.zeros(120, dtype=torch.float64)
        full[delta.indices.long()] = delta.values.double()
        if kind in ("magnitude_prune", "ties") and density < 1:
            keep = int(density * delta.count + 0.5)
            order = sorted(delta.indices.tolist(), key=lambda i: (-abs(float(full[i])), i))
            full[order[keep:]] = 0.0
        if kind in ("dare_linear", "dare_ties") and density < 1:
            draws = torch.rand(delta.count, generator=generator, dtype=torch.float64)
            for i, draw in zip(delta.indices.tolist(), draws.tolist(), strict=True):
                full[i] = float(full[i]) / density if draw < density else 0.0
        dense.append(full)
    result = torch.zeros(120, dtype=torch.float64)
    for i in range(120):
        here = [float(full[i]) for full in dense]
        if kind.endswith("ties"):
            vote = sum(here) if method == "total" else sum((v > 0) - (v < 0) for v in here)
            agreeing = [w * v for w, v in zip(weights, here, strict=True) if (v > 0 if vote >= 0 else v < 0)]
            result[i] = sum(agreeing) / max(len(agreeing), 1)
        else:
            result[i] = sum(w * v for w, v in zip(weights, here, strict=True))
    return result.view(SHAPE)


def bits(delta: SparseDelta) -> tuple[list[int], bytes]:
    return delta.indices.tolist(), delta.values.view(torch.uint8).numpy().tobytes()


@pytest.fixture(params=[2**20, 8], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Once in one piece, once in many."""
    monkeypatch.setattr(module, "_CHUNK", request.param)
    return request.param


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, -1.3, 2.0], [1.0, 0.0, -1.0]])
@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("kind", list(COMBINATIONS))
def test_equals_the_dense_oracle(kind: str, density: float, method: str, weights: list[float]) -> None:
    deltas = random_deltas()
    options: dict[str, Any] = {} if kind == "linear" else {"density": density, "majority_sign_method": method}
    result = combine(deltas, weights, kind, generator=torch.Generator().manual_seed(5), **options).check()
    expected = oracle(deltas, weights, kind, density=density, method=method, generator=torch.Generator().manual_seed(5))
    assert result.shape == SHAPE
    assert result.values.dtype == torch.float32
    # Equal to the oracle rounded to float32, up to one unit where the float64 sums differ in order.
    torch.testing.assert_close(result.to_dense(), expected.float(), rtol=1.2e-7, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The density 1.0")
@pytest.mark.parametrize("kind", ["ties", "dare_ties", "magnitude_prune", "dare_linear"])
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_equals_peft_where_nothing_is_zero_or_tied(kind: str, method: str) -> None:
    # On a full support without ties, density means the same here and in PEFT (40 * 0.5 needs no rounding).
    tensors = [torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    weights = [0.5, -1.5, 1.0]
    # PEFT draws float32 Bernoulli numbers, so its random types are compared without a drop.
    density = 0.5 if kind in ("ties", "magnitude_prune") else 1.0
    arguments = [method] if kind.endswith("ties") else []
    expected = getattr(merge_utils, kind)(tensors, torch.tensor(weights), density, *arguments)
    deltas = [SparseDelta.from_dense(tensor) for tensor in tensors]
    result = combine(deltas, weights, kind, density=density, majority_sign_method=method)
    torch.testing.assert_close(result.to_dense(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(COMBINATIONS))
def test_one_adapter_at_weight_one_is_itself_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    values = torch.tensor([1e-30, -0.1, 3.3333, -65000.0]).to(dtype)
    if kind == "linear":
        values[0] = -0.0
    delta = SparseDelta(torch.tensor([0, 7, 8, 119], dtype=torch.int32), values, SHAPE)
    result = combine([delta], [1.0], kind, density=None if kind == "linear" else 1.0)
    # 1e-30 is zero in float16, and a zero has no sign to elect: it stays in the support all the same.
    assert bits(result) == bits(delta)
    assert result.values.dtype == dtype
    assert result.values.data_ptr() != delta.values.data_ptr(), "the result must not share the adapter's memory"


@pytest.mark.parametrize("kind", ["linear", "ties", "magnitude_prune"])
def test_order_of_the_adapters_changes_no_bit(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    # Magnitudes so different that float32 sums, and often float64 sums, depend on their order.
    deltas = [
        SparseDelta(
            delta.indices, delta.values * 10.0 ** torch.randint(-9, 9, (delta.count,), generator=generator), SHAPE
        )
        for delta in random_deltas(4)
    ]
    weights = [0.3, -1.7, 1.1, 1e9]
    density = None if kind == "linear" else 0.9
    expected = bits(combine(deltas, weights, kind, density=density))
    for order in ([3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]):
        permuted = combine([deltas[i] for i in order], [weights[i] for i in order], kind, density=density)
        assert bits(permuted) == expected


@pytest.mark.parametrize("kind", ["linear", "ties"])
def test_order_changes_no_bit_where_even_float64_rounds(kind: str) -> None:
    deltas = [SparseDelta(torch.tensor([0], dtype=torch.int32), torch.tensor([v]), (1,)) for v in (1e16, 1.0, -1e16)]
    orders = [[0, 1, 2], [0, 2, 1], [1, 2, 0]]
    density = None if kind == "linear" else 1.0
    found = {combine([deltas[i] for i in order], [1.0] * 3, kind, density=density).values.item() for order in orders}
    assert len(found) == 1


def test_linear_keeps_the_union_even_where_values_cancel() -> None:
    first = SparseDelta(torch.tensor([1, 4], dtype=torch.int32), torch.tensor([0.5, 2.0]), SHAPE)
    second = SparseDelta(torch.tensor([4, 9], dtype=torch.int32), torch.tensor([1.0, 3.0]), SHAPE)
    result = combine([first, second], [1.0, -2.0], "linear")
    assert result.indices.tolist() == [1, 4, 9]
    assert result.values.tolist() == [0.5, 0.0, -6.0]


def test_sums_are_rounded_once() -> None:
    # In float32 both small terms vanish into 1.0 one by one; together they count.
    deltas = [SparseDelta(torch.tensor([0], dtype=torch.int32), torch.tensor([v]), (1,)) for v in (1.0, 5e-8, 5e-8)]
    assert combine(deltas, [1.0, 1.0, 1.0], "linear").values.item() == torch.tensor(1.0 + 1e-7).item() > 1.0


def test_density_is_a_share_of_each_adapters_own_values() -> None:
    large = SparseDelta(torch.arange(100, dtype=torch.int32), torch.arange(1.0, 101.0), SHAPE)
    small = SparseDelta(torch.tensor([110, 111], dtype=torch.int32), torch.tensor([0.1, 0.2]), SHAPE)
    result = combine([large, small], [1.0, 1.0], "magnitude_prune", density=0.1)
    assert result.indices.tolist() == [*range(90, 100), 111]


def test_magnitude_ties_go_to_the_lowest_index() -> None:
    delta = SparseDelta(torch.tensor([2, 5, 7, 8], dtype=torch.int32), torch.tensor([1.0, -1.0, 1.0, -1.0]), SHAPE)
    assert combine([delta], [1.0], "magnitude_prune", density=0.5).indices.tolist() == [2, 5]


def test_sign_election_by_total_and_by_frequency() -> None:
    deltas = [SparseDelta(torch.tensor([3], dtype=torch.int32), torch.tensor([v]), SHAPE) for v in (5.0, -1.0, -2.0)]
    assert combine(deltas, [1.0, 1.0, 1.0], "ties", density=1.0).values.item() == 5.0
    by_number = combine(deltas, [1.0, 1.0, 1.0], "ties", density=1.0, majority_sign_method="frequency")
    assert by_number.values.item() == -1.5
    # Weights scale the mean but have no vote.
    assert combine(deltas, [-2.0, 9.0, 9.0], "ties", density=1.0).values.item() == -10.0
    even = [deltas[0], SparseDelta(deltas[0].indices, torch.tensor([-5.0]), SHAPE)]
    assert combine(even, [1.0, 1.0], "ties", density=1.0).values.item() == 5.0


def test_an_absent_position_has_no_vote_and_is_not_averaged() -> None:
    first = SparseDelta(torch.tensor([1], dtype=torch.int32), torch.tensor([-3.0]), SHAPE)
    second = SparseDelta(torch.tensor([2], dtype=torch.int32), torch.tensor([4.0]), SHAPE)
    result = combine([first, second], [1.0, 1.0], "ties", density=1.0)
    assert result.values.tolist() == [-3.0, 4.0]


def test_dare_keeps_the_density_and_the_mean() -> None:
    delta = SparseDelta(torch.arange(100_000, dtype=torch.int32), torch.ones(100_000), (100_000,))
    result = combine([delta], [1.0], "dare_linear", density=0.3, generator=torch.Generator().manual_seed(0))
    assert abs(result.count - 30_000) < 4.5 * (100_000 * 0.3 * 0.7) ** 0.5
    assert torch.equal(result.values, torch.full((result.count,), 1 / 0.3, dtype=torch.float64).float())


def test_dare_repeats_with_its_generator() -> None:
    deltas = random_deltas()
    draws = [
        bits(combine(deltas, [1.0] * 3, "dare_ties", density=0.5, generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    torch.manual_seed(8)
    from_global = bits(combine(deltas, [1.0] * 3, "dare_ties", density=0.5))
    torch.manual_seed(8)
    assert bits(combine(deltas, [1.0] * 3, "dare_ties", density=0.5)) == from_global


@pytest.mark.parametrize("kind", list(COMBINATIONS))
def test_empty_deltas(kind: str) -> None:
    density = None if kind == "linear" else 1.0
    empty, delta = SparseDelta.empty(SHAPE), random_deltas(1, dtype=torch.bfloat16)[0]
    result = combine([empty, delta, empty], [2.0, 1.0, 3.0], kind, density=density)
    # An adapter without this weight decides neither its values nor their dtype.
    assert bits(result) == bits(delta)
    assert combine([empty, empty], [1.0, 1.0], kind, density=density).count == 0


def test_everything_may_be_dropped() -> None:
    result = combine(random_deltas(), [1.0] * 3, "dare_ties", density=1e-12, generator=torch.Generator().manual_seed(0))
    assert (result.count, result.shape) == (0, SHAPE)


def test_dtypes_are_promoted() -> None:
    half, brain = random_deltas(1, dtype=torch.float16)[0], random_deltas(1, dtype=torch.bfloat16)[0]
    assert combine([half, brain], [1.0, 1.0], "linear").values.dtype == torch.float32


def test_inputs_are_left_alone() -> None:
    deltas = random_deltas()
    before = [bits(delta) for delta in deltas]
    for kind in COMBINATIONS:
        combine(deltas, [0.5, -1.0, 2.0], kind, density=None if kind == "linear" else 0.5)
    assert [bits(delta) for delta in deltas] == before


def test_large_indices() -> None:
    indices = torch.tensor([5, 2**31, 2**33 - 1])
    delta = SparseDelta(indices, torch.tensor([1.0, 2.0, 3.0]), (2**20, 2**13))
    result = combine([delta, delta], [1.0, 1.0], "linear")
    assert result.indices.tolist() == indices.tolist()
    assert result.values.tolist() == [2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"combination_type": "svd"}, r"combination_type must be one of \['linear', .*'dare_ties'\], got 'svd'"),
        ({"deltas": [], "weights": []}, "at least one delta"),
        ({"weights": [1.0]}, "weights must have one number per adapter, got 1 for 2 adapters"),
        ({"weights": [1.0, float("nan")]}, r"weights must be finite, got \[1\.0, nan\]"),
        ({"majority_sign_method": "mean"}, r"majority_sign_method must be one of \['total', 'frequency'\], got 'mean'"),
        ({"density": 0.5}, "density=0.5 has no meaning for 'linear'"),
        *[({"combination_type": kind}, rf"density must be in \(0, 1\] for '{kind}' .*, got None") for kind in PRUNING],
        ({"combination_type": "ties", "density": 0.0}, r"density must be in \(0, 1\] for 'ties' .*, got 0\.0"),
        ({"combination_type": "ties", "density": 1.5}, r"density must be in \(0, 1\] for 'ties' .*, got 1\.5"),
        ({"combination_type": "ties", "density": True}, r"density must be in \(0, 1\] for 'ties' .*, got True"),
    ],
)
def test_bad_arguments(change: dict[str, Any], match: str) -> None:
    arguments: dict[str, Any] = {"deltas": random_deltas(2), "weights": [1.0, 1.0], "combination_type": "linear"}
    with pytest.raises(ConfigError, match=match):
        combine(**{**arguments, **change})


def test_shapes_must_be_equal() -> None:
    first = random_deltas(1)[0]
    other = SparseDelta(first.indices, first.values, (10, 12))
    with pytest.raises(ConfigError, match=r"only deltas of one weight .* \[\(12, 10\), \(10, 12\)\]"):
        combine([first, other], [1.0, 1.0], "linear")

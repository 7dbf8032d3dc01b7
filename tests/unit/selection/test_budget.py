"""Requests, rounding, and totals that are spread exactly."""

from __future__ import annotations

import time
from typing import Any

import pytest

from peft_sparse.errors import ConfigError
from peft_sparse.selection.budget import Group, draw_counts, groups_of, round_density, total_from_request

SHAPES: dict[str, tuple[int, ...]] = {"q.weight": (8, 6), "q.bias": (8,), "up.weight": (10, 4), "norm.weight": (4,)}
SIZES = {"q.weight": 48, "q.bias": 8, "up.weight": 40, "norm.weight": 4}


@pytest.mark.parametrize(
    ("density", "numel", "expected"),
    [
        (0.5, 10, 5),
        (0.35, 10, 4),  # 3.5 rounds up, though 0.35 * 10 is not exact in binary.
        (0.25, 10, 3),  # 2.5 rounds up, where Python's round gives 2.
        (0.24, 10, 2),
        (0.145, 1000, 145),
        (1e-9, 10, 1),
        (1.0, 10, 10),
        (1, 10, 10),
        (0.01, 10**12 + 50, 10**10 + 1),
        (0.5, 0, 0),
    ],
)
def test_density_rounds_half_up_and_at_least_one(density: float, numel: int, expected: int) -> None:
    assert round_density(density, numel) == expected


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, 3, float("nan"), True])
def test_density_out_of_range(density: float) -> None:
    with pytest.raises(ConfigError, match=rf"density must be in \(0, 1\], got {density}\. To give an absolute number"):
        round_density(density, 10)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"density": 0.1}, 10),
        ({"density": 0.1, "density_of": "model", "model_numel": 400}, 40),
        ({"num_weights": 1}, 1),
        ({"num_weights": 100}, 100),
        ({"equivalent_rank": 2, "linear_names": ["q.weight", "up.weight", "elsewhere.weight"]}, 2 * (14 + 14)),
    ],
)
def test_totals(request_: dict[str, Any], expected: int) -> None:
    assert total_from_request(shapes=SHAPES, **request_) == expected


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({}, "exactly one of density, num_weights and equivalent_rank, got none"),
        ({"density": 0.1, "num_weights": 3}, "got density=0.1 and num_weights=3"),
        ({"density": 3}, r"density must be in \(0, 1\], got 3"),
        ({"density": 0.1, "density_of": "layers"}, "density_of must be 'targets' or 'model', got 'layers'"),
        ({"density": 0.1, "density_of": "model"}, "needs model_numel"),
        (
            {"density": 0.5, "density_of": "model", "model_numel": 400},
            "density=0.5 of the model asks for 200 weights, but .* hold 100",
        ),
        ({"num_weights": 0}, "num_weights must be an int >= 1, got 0"),
        ({"num_weights": 2.0}, r"num_weights must be an int >= 1, got 2\.0"),
        ({"num_weights": 101}, "num_weights=101 asks for 101 weights, but the targeted tensors hold 100. Ask for less"),
        ({"equivalent_rank": 0, "linear_names": ["q.weight"]}, "equivalent_rank must be an int >= 1, got 0"),
        ({"equivalent_rank": 8, "linear_names": ["q.weight"]}, "equivalent_rank=8 asks for 112 weights"),
        ({"equivalent_rank": 1}, "none is targeted. Use density or num_weights"),
        ({"equivalent_rank": 1, "linear_names": ["q.bias"]}, r"two-dimensional linear weights, got the shape \(8,\)"),
    ],
)
def test_bad_requests(request_: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        total_from_request(shapes=SHAPES, **request_)


def test_nothing_targeted() -> None:
    with pytest.raises(ConfigError, match="no weight is targeted"):
        total_from_request(density=0.1, shapes={"w": (0, 4)})


def uniform(total: int, sizes: dict[str, int]) -> dict[str, int]:
    """Counts per tensor."""
    return {group.name: group.count for group in groups_of("uniform", total, sizes)}


def test_uniform_gives_remainders_to_the_largest_and_ties_to_the_first() -> None:
    # Exact shares of 7: 3.36, 0.56, 2.8, 0.28.
    assert uniform(7, SIZES) == {"q.weight": 3, "q.bias": 1, "up.weight": 3, "norm.weight": 0}
    assert uniform(2, {"c": 5, "a": 5, "b": 5}) == {"c": 1, "a": 1, "b": 0}
    assert uniform(100, SIZES) == SIZES
    assert uniform(0, SIZES) == dict.fromkeys(SIZES, 0)
    assert uniform(0, {"w": 0}) == {"w": 0}


def test_groups_of_each_budget() -> None:
    assert groups_of("uniform", 50, {"a": 60, "b": 40}) == [Group("a", ("a",), 30), Group("b", ("b",), 20)]
    assert groups_of({"b": 0.25, "a": 0.75}, 8, {"a": 9, "b": 9}) == [Group("b", ("b",), 2), Group("a", ("a",), 6)]
    assert groups_of("global", 50, SIZES) == [Group("global", tuple(SIZES), 50)]
    assert groups_of({r"q\.": 0.7, "up|norm": 0.3}, 10, SIZES) == [
        Group(r"q\.", ("q.weight", "q.bias"), 7),
        Group("up|norm", ("up.weight", "norm.weight"), 3),
    ]


def test_shares_are_taken_as_they_print_and_sum_exactly() -> None:
    sizes = {f"{name}.w": 1000 for name in "abcdefghij"}
    groups = groups_of({rf"^{name}\.": 0.1 for name in "abcdefghij"}, 105, sizes)
    assert [group.count for group in groups] == [11] * 5 + [10] * 5
    thirds = groups_of({"a": 0.333333, "b": 0.333333, "c": 0.333333}, 100, {"a": 90, "b": 90, "c": 90})
    assert [group.count for group in thirds] == [34, 33, 33]


@pytest.mark.parametrize(
    ("budget", "match"),
    [
        ("layers", r"budget must be one of 'uniform', 'global', 'sc_sft_nli', .* or \{regex: share\}, got 'layers'"),
        ({"q": 0.5, "up|norm": 0.4}, "shares of the budget must sum to 1, got 0.9"),
        ({"q": 0.5, "up|norm": 0.500002}, "must sum to 1, got 1"),
        ({"q": float("nan"), "up|norm": 1.0}, r"share of budget group 'q' must be in \[0, 1\], got nan"),
        ({"q": -0.5, "up|norm": 1.5}, r"share of budget group 'q' must be in \[0, 1\], got -0\.5"),
        ({"q": 0.5, "up": 0.5}, r"parameter 'norm\.weight' matches none of the budget groups \['q', 'up'\]"),
        (
            {"q|norm": 0.5, "up|norm": 0.5},
            r"overlap: parameter 'norm\.weight' must match exactly one, matches \['q\|norm', 'up\|norm'\]",
        ),
        (
            {"q": 0.5, "up|norm": 0.25, "down": 0.25},
            r"groups \['down'\] match no targeted parameter; .* like 'q\.weight'",
        ),
        ({"(": 1.0}, r"budget group '\(' is not a valid regular expression: "),
        (
            {"q": 0.5, "up": 0.2, "norm": 0.3},
            r"'norm' holds 4 weights, but its share 0\.3 of 50 asks for 15\. .* at most 0\.08",
        ),
    ],
)
def test_bad_budgets(budget: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        groups_of(budget, 50, SIZES)


def test_total_out_of_range() -> None:
    with pytest.raises(ConfigError, match="total must be between 0 and the 100 targeted weights, got 101"):
        groups_of("uniform", 101, SIZES)


def test_drawn_counts_sum_per_group_and_repeat() -> None:
    groups = groups_of({r"q\.": 0.7, "up|norm": 0.3}, 60, SIZES)
    counts = draw_counts(groups, SIZES, seed=0)
    assert list(counts) == list(SIZES)
    assert (counts["q.weight"] + counts["q.bias"], counts["up.weight"] + counts["norm.weight"]) == (42, 18)
    assert all(0 <= counts[name] <= SIZES[name] for name in SIZES)
    assert draw_counts(groups, SIZES, seed=0) == counts
    assert any(draw_counts(groups, SIZES, seed=seed) != counts for seed in range(1, 9))
    assert draw_counts(groups_of("uniform", 7, SIZES), SIZES, seed=0) == uniform(7, SIZES)


@pytest.mark.parametrize(
    ("layers", "shapes"),
    [
        (1000, {"q.weight": (24, 24), "up.weight": (24, 16), "q.bias": (24,), "norm.weight": (24,)}),  # a million
        (500, {"q.weight": (4096, 4096), "up.weight": (4096, 14336), "norm.weight": (4096,)}),  # 38 thousand million
    ],
)
@pytest.mark.parametrize("budget", ["uniform", "global", {r"\.q\.": 0.3, "up|norm": 0.7}])
def test_thousands_of_tensors_allocate_at_once(layers: int, shapes: dict[str, tuple[int, int]], budget: Any) -> None:
    all_shapes = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}
    start = time.process_time()
    total = total_from_request(density=0.05, shapes=all_shapes)
    sizes = {name: shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in all_shapes.items()}
    counts = draw_counts(groups_of(budget, total, sizes), sizes, seed=0)
    elapsed = time.process_time() - start
    assert sum(counts.values()) == total
    assert all(counts[name] <= sizes[name] for name in sizes)
    assert elapsed < 1.0

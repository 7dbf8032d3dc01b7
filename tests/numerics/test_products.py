"""Entries of a product made tile by tile, and of some of its rows alone."""

from __future__ import annotations

import gc
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from peft_sparse.core.backends import products
from tests.support.oracle import relative_error

ROWS, COLUMNS = 40, 12


def factors(num: int, *, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(num)
    return tuple(torch.randn(num, width, generator=generator).to(device, dtype) for width in (ROWS, COLUMNS))


def in_rows(rows: list[int], count: int, *, seed: int = 0) -> Tensor:
    """[count] sorted positions that lie in some rows alone."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.cat([torch.arange(row * COLUMNS, (row + 1) * COLUMNS) for row in rows])
    return places[torch.randperm(places.numel(), generator=generator)[:count]].sort().values.int()


EVERYWHERE = list(range(ROWS))
SUPPORTS = {
    "all rows": [in_rows(EVERYWHERE, 200)],
    "every entry": [torch.arange(ROWS * COLUMNS, dtype=torch.int32)],
    "few rows": [in_rows([3, 4, 17, 39], 20)],
    "first and last row": [in_rows([0, 39], 24)],
    "two with other rows": [in_rows([3, 4], 9), in_rows([4, 30], 11, seed=1)],
    "one confined, one not": [in_rows([3, 4], 9), in_rows(EVERYWHERE, 100)],
    "one empty": [in_rows([5], 0), in_rows([7, 8], 5)],
    "all empty": [in_rows([5], 0)],
    "wide indices": [in_rows([2, 20], 13).long()],
}


@pytest.mark.parametrize("tile_rows", [1, 7, 1000])
@pytest.mark.parametrize("supports", SUPPORTS.values(), ids=SUPPORTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_entries_equal_those_of_the_dense_product(dtype, supports, tile_rows, monkeypatch):
    monkeypatch.setattr(products, "TILE_BYTES", 4 * COLUMNS * tile_rows)
    monkeypatch.setattr(products, "_TILE_STEP", 1)
    check_entries(supports, dtype=dtype)


def check_entries(supports: list[Tensor], *, dtype: torch.dtype, device: str = "cpu") -> None:
    supports = [support.to(device) for support in supports]
    for num in (0, 33):
        left, right = factors(num, dtype=dtype, device=device)
        dense = (left.double().t() @ right.double()).view(-1)
        found = products.entries_of_product(left, right, supports)
        for one, own in zip(found, supports, strict=True):
            assert one.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert one.shape == own.shape
            if own.numel() and num:
                assert relative_error(one, dense[own.long()]) < (1e-14 if dtype == torch.float64 else 1e-6)
            else:
                assert not one.any()


def test_only_rows_that_hold_entries_are_multiplied(monkeypatch):
    seen = []
    product = products.wide_product
    monkeypatch.setattr(products, "wide_product", lambda a, b: seen.append(tuple(a.shape)) or product(a, b))
    left, right = factors(9, dtype=torch.float32)
    products.entries_of_product(left, right, SUPPORTS["few rows"])
    products.entries_of_product(left, right, SUPPORTS["all rows"])
    products.entries_of_product(left, right, SUPPORTS["one confined, one not"])
    assert seen == [(9, 4), (9, ROWS), (9, ROWS)]


def test_tiles_without_entries_are_left_out(monkeypatch):
    monkeypatch.setattr(products, "TILE_BYTES", 4 * COLUMNS * 10)
    monkeypatch.setattr(products, "_TILE_STEP", 1)
    seen = []
    product = products.wide_product
    monkeypatch.setattr(products, "wide_product", lambda a, b: seen.append(tuple(a.shape)) or product(a, b))
    left, right = factors(9, dtype=torch.float32)
    support = in_rows([row for row in EVERYWHERE if row < 10 or row >= 20], 300)
    (found,) = products.entries_of_product(left, right, [support])
    assert seen == [(9, 10)] * 3
    assert relative_error(found, (left.t() @ right).view(-1)[support.long()]) < 1e-6


class TestRememberedLayouts:
    def test_the_same_support_is_laid_out_once(self):
        support = in_rows([1, 2], 10)
        first = products.layout_of([support], (ROWS, COLUMNS))
        assert products.layout_of([support.detach()], (ROWS, COLUMNS)) is first

    def test_another_shape_is_another_layout(self):
        support = in_rows([1, 2], 10)
        first = products.layout_of([support], (ROWS, COLUMNS))
        other = products.layout_of([support], (COLUMNS, ROWS))
        assert other.num_columns == ROWS
        assert first.rows.tolist() == [1, 2]

    def test_a_support_changed_in_place_is_laid_out_anew(self):
        support = in_rows([1, 2], 10)
        products.layout_of([support], (ROWS, COLUMNS))
        support.add_(COLUMNS)
        assert products.layout_of([support], (ROWS, COLUMNS)).rows.tolist() == [2, 3]

    def test_a_slice_is_another_support(self):
        support = in_rows([1, 2], 2 * COLUMNS)
        products.layout_of([support], (ROWS, COLUMNS))
        assert products.layout_of([support[:COLUMNS]], (ROWS, COLUMNS)).rows.tolist() == [1]
        assert products.layout_of([support[COLUMNS:]], (ROWS, COLUMNS)).rows.tolist() == [2]

    def test_memory_that_is_used_again_is_not_mistaken(self):
        for row in range(50):
            support = in_rows([row % ROWS], 5)
            assert products.layout_of([support], (ROWS, COLUMNS)).rows.tolist() == [row % ROWS]
            del support

    def test_layouts_die_with_their_supports(self, monkeypatch):
        monkeypatch.setattr(products, "_layouts", {})
        monkeypatch.setattr(products, "_sweep_at", 8)
        kept = in_rows([3], 4)
        products.layout_of([kept], (ROWS, COLUMNS))
        for row in range(40):
            products.layout_of([in_rows([row], 5)], (ROWS, COLUMNS))
        gc.collect()
        products._forget_dead()
        assert len(products._layouts) <= 256
        monkeypatch.setattr(products, "_sweep_at", 0)
        products._forget_dead()
        assert len(products._layouts) == 1
        assert products.layout_of([kept], (ROWS, COLUMNS)).rows.tolist() == [3]

    def test_a_support_of_inference_mode(self):
        with torch.inference_mode():
            support = in_rows([6], 3)
        assert products.layout_of([support], (ROWS, COLUMNS)).rows.tolist() == [6]


def test_layouts_are_remembered_and_dropped_in_several_threads(monkeypatch):
    class Interrupted(dict):
        """One whose items come one by one, so that other threads run in between."""

        def items(self):
            for item in super().items():
                time.sleep(0)
                yield item

    monkeypatch.setattr(products, "_layouts", Interrupted())
    monkeypatch.setattr(products, "_sweep_at", 4)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def lay_out(row):
        return products.layout_of([torch.arange(COLUMNS) + row % ROWS * COLUMNS], (ROWS, COLUMNS)).rows.tolist()

    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lay_out, range(1500))) == [[row % ROWS] for row in range(1500)]
    finally:
        sys.setswitchinterval(before)

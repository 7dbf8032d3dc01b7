"""Random supports of adapters with one seed do not lie inside each other, and are the same when made again."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import get_peft_model

from peft_sparse import OneShotConfig, RandConfig, SpielAGConfig, iter_deltas, select_by_gradients
from peft_sparse.composition.coinciding_draws import shared_positions
from peft_sparse.core.delta import SparseDelta
from tests.support.models import IDS, llama


def support(config, name="default"):
    return {path: d.delta for path, _, _, d in iter_deltas(get_peft_model(llama(), config, adapter_name=name), name)}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (RandConfig(density=0.2), "task"),
        (RandConfig(density=0.3), "default"),
        (RandConfig(density=0.2, task_type="CAUSAL_LM"), "default"),
        (SpielAGConfig(density=0.2), "default"),
        (RandConfig(density=0.2, seed=1), "default"),
    ],
)
def test_draws_are_independent(config, name):
    shared, expected = shared_positions(support(RandConfig(density=0.2)), support(config, name), at_least=0)
    assert shared == pytest.approx(expected, abs=0.05)


def test_a_draw_can_be_made_again():
    assert shared_positions(support(RandConfig(density=0.2)), support(RandConfig(density=0.2)), at_least=0)[0] == 1


def test_adding_up_the_same_draw_warns(tmp_path, caplog):
    get_peft_model(llama(), RandConfig(density=0.2)).save_pretrained(tmp_path)
    model = get_peft_model(llama(), RandConfig(density=0.2))
    model.load_adapter(tmp_path, "b")
    model.add_adapter("c", RandConfig(density=0.2))
    with caplog.at_level(logging.WARNING, "peft_sparse"):
        model.base_model.add_weighted_adapter(["default", "c"], [1, 1], "fine")
        model.base_model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "average")
        assert not caplog.records
        model.base_model.add_weighted_adapter(["default", "b"], [1, 1], "sum")
    assert "share 100 % of their weights, where two independent draws would share 20 %" in caplog.text


def test_adding_up_two_with_the_same_random_part_warns(tmp_path, caplog):
    def adapter(name="default", **fields):
        config = OneShotConfig(density=0.2, criterion="gradient", random_share=0.5, selection_batches=1, **fields)
        model = get_peft_model(llama(), config, adapter_name=name)
        select_by_gradients(model, [{"input_ids": IDS, "labels": IDS}], adapter_name=name)
        model.save_pretrained(tmp_path / str(fields))
        return model

    model = adapter()
    adapter(seed=1)
    model.load_adapter(tmp_path / "{}", "same")
    model.load_adapter(tmp_path / "{'seed': 1}", "apart")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "peft_sparse"):
        model.base_model.add_weighted_adapter(["default", "apart"], [1, 1], "fine")
        assert not caplog.records
        model.base_model.add_weighted_adapter(["default", "same"], [1, 1], "sum")
    assert "The random parts of default and same are the same weights." in caplog.text


def test_stopping_early_overlooks_no_pair():
    def part(start, *counts):
        supports = [
            torch.arange(start if n == 0 else 0, start + count if n == 0 else count).int()
            for n, count in enumerate(counts)
        ]
        return {str(n): SparseDelta(s, torch.ones(len(s)), (8, 8)) for n, s in enumerate(supports)}

    # The first tensor is not shared, the second one is: 50 of 60, and 30 of 40.
    for count, is_found in ((50, True), (30, False)):
        one, other = part(0, 10, count), part(20, 10, count)
        whole = shared_positions(one, other, at_least=0)
        assert whole[0] == count / (10 + count)
        assert shared_positions(one, other, at_least=0.8) == (whole if is_found else None)

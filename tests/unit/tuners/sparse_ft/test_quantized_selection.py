"""Criteria over quantised weights: what the ordinary model of the dequantised weights gives."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("bitsandbytes")

from peft import get_peft_model

from peft_sparse import GivenConfig, OneShotConfig, RandConfig, iter_deltas, select_by_gradients
from tests.support.quantized import IDS, LINEARS, QUANTIZED, load, twin

# bitsandbytes' warnings about CPUs are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")
BATCH = {"input_ids": IDS, "labels": IDS}


def supports(model):
    return {name: delta.indices for name, _, _, delta in iter_deltas(model)}


def share_in_common(first, second):
    assert first.keys() == second.keys()
    common = sum(len(set(first[name].tolist()) & set(second[name].tolist())) for name in first)
    return common / sum(map(len, first.values()))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_magnitudes_are_those_of_the_dequantised_weights(kind):
    ordinary = twin(get_peft_model(load(kind), RandConfig(density=0.1, target_modules=LINEARS)))
    config = OneShotConfig(density=0.05, criterion="largest_weight", target_modules=LINEARS)
    found, expected = supports(get_peft_model(load(kind), config)), supports(get_peft_model(ordinary, config))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("criterion", ["fisher", "weight_times_gradient"])
@pytest.mark.parametrize("kind", ["nf4", "8 bit"])
def test_gradients_are_those_of_the_dequantised_weights(kind, criterion):
    ordinary = twin(get_peft_model(load(kind), RandConfig(density=0.1, target_modules=LINEARS)))
    config = OneShotConfig(density=0.05, criterion=criterion, target_modules=LINEARS)
    model, plain = get_peft_model(load(kind), config), get_peft_model(ordinary, config)
    found, expected = select_by_gradients(model, [BATCH]), select_by_gradients(plain, [BATCH])
    # The products of quantised layers round otherwise, so weights at the very cut may differ.
    assert share_in_common(found, expected) > 0.99


def test_given_indices_on_a_quantised_base():
    support = {"model.layers.0.self_attn.q_proj.weight": [5, 4000]}
    assert supports(get_peft_model(load("nf4"), GivenConfig(support=support))).keys() == support.keys()

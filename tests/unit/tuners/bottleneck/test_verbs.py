"""PEFT's verbs over bottleneck adapters of every kind, as one table; the cells compare with formulas in float64."""

from __future__ import annotations

import pytest
import torch

from peft_sparse.tuners.bottleneck.layer import BottleneckLayer
from tests.support.bottleneck import REQUESTS, Case, logits, tensors_of
from tests.support.bottleneck_verbs import VERBS

# PEFT warns about adapter names, transformers about a name of its own that PEFT uses: none of it is ours.
pytestmark = pytest.mark.filterwarnings("ignore")


# All verbs on one request for each way of standing in a model; on the others those that depend on what happens there.
THOROUGH = ("pfeiffer on post-norm", "pfeiffer on pre-norm", "nice on a decoder")
EVERYWHERE = (
    "add_adapter, set_adapter",
    "set_adapter of several",
    "a frozen adapter beside one that trains",
    "save_pretrained, from_pretrained, load_adapter",
    "merge_and_unload",
    "adapter_names",
    "unload",
)
CELLS = [(verb, request_) for request_ in REQUESTS for verb in VERBS if request_ in THOROUGH or verb in EVERYWHERE]


@pytest.mark.parametrize(("verb", "request_"), CELLS)
def test_verb(verb, request_, tmp_path):
    VERBS[verb](Case(request_), tmp_path)


def _without(placement):
    def at(layer, where, adapters=None, original=BottleneckLayer.at):
        return [] if where == placement else original(layer, where, adapters)

    return at


# One bug for each kind of answer the oracle gives: the cell that must notice it.
BUGS = {
    "an adapter that is not applied": ("pfeiffer on post-norm", "set_adapter of several", _without("norm")),
    "a block without its hook": ("pfeiffer on pre-norm", "add_adapter, set_adapter", _without("block")),
    "a stack in the wrong order": (
        "houlsby",
        "set_adapter of several",
        lambda layer, where, adapters=None, original=BottleneckLayer.at: original(layer, where, adapters)[::-1],
    ),
    "disabled adapters that still act": (
        "pfeiffer on post-norm",
        "disable_adapter",
        lambda layer, where, adapters=None, original=BottleneckLayer.at: original(
            layer, where, layer.active_adapters if adapters is None else adapters
        ),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_table_notices(bug, monkeypatch, tmp_path):
    request_, verb, wrong = BUGS[bug]
    VERBS[verb](Case(request_), tmp_path)
    monkeypatch.setattr(BottleneckLayer, "at", wrong)
    with pytest.raises(AssertionError):
        VERBS[verb](Case(request_), tmp_path)


@pytest.mark.parametrize("request_", REQUESTS)
def test_the_oracle_is_not_the_base_model(request_):
    case = Case(request_)
    part = tensors_of(case.model(), "default")
    assert (case.expected(part) - logits(case.base())).abs().max() > 1e-2
    zero = {path: {name: torch.zeros_like(t) for name, t in tensors.items()} for path, tensors in part.items()}
    torch.testing.assert_close(case.expected(zero), logits(case.base()))

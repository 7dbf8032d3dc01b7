"""PEFT's verbs over all our adapter types, as one table; every cell compares with formulas in float64."""

from __future__ import annotations

import pytest
import torch

from peft_sparse.tuners.bottleneck.layer import BottleneckLayer
from peft_sparse.tuners.sparse_ft.configs.base import METHODS
from peft_sparse.tuners.sparse_ft.layers.base import SparseLayer
from tests.support import bottleneck, madg, sparse
from tests.support.exact import logits
from tests.support.madg import VECTORS, MadGCase
from tests.support.verbs import expected, verbs_of

# PEFT warns about switching while merged, transformers about a name of its own that PEFT uses: none of it is ours.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = {
    **{f"{name}-{kind}": sparse.Case(kind, name) for kind in ("llama", "gpt2") for name in sparse.REQUESTS},
    **{name: bottleneck.Case(name) for name in bottleneck.REQUESTS},
    **{name: MadGCase(name, language="quy") for name in madg.REQUESTS},
}
# By default all verbs are tried on one request for each way of acting in a model, on the others those that depend on
# what happens there; the slow tests try everything everywhere.
THOROUGH = {
    *(f"{name}-llama" for name in ("rand", "spiel_ag", "lottery_ticket", "every parameter", "bfloat16 values")),
    *("global budget, norms and biases-llama", "soft masks-llama", "weights under soft masks-llama"),
    *("rand-gpt2", "every parameter-gpt2", "weights under soft masks-gpt2"),
    *("pfeiffer on post-norm", "pfeiffer on pre-norm", "nice on a decoder"),
    *("MAD-G", "MAD-G-LS", "MAD-G on pre-norm"),
}
EVERYWHERE = {
    "get_peft_model",
    "add_adapter, set_adapter",
    "set_adapter of several",
    "a frozen adapter beside one that trains",
    "save_pretrained, from_pretrained, load_adapter",
    "merge_and_unload",
    "adapter_names",
    "unload",
}
# What one method chooses differs from what another does, not where it lies: on the second model, whose layers are of
# another class, one method goes through all verbs, and the others through these.
OF_METHODS = {"get_peft_model", "save_pretrained, from_pretrained, load_adapter"}


def cells():
    for name, case in CASES.items():
        is_method_again = isinstance(case, sparse.Case) and case.kind == "gpt2" and case.request in METHODS
        for verb in verbs_of(case):
            quick = name in THOROUGH or verb in (OF_METHODS if is_method_again else EVERYWHERE)
            yield pytest.param(verb, name, marks=() if quick else pytest.mark.slow)


def test_what_is_tried_by_default_is_in_the_table():
    assert CASES.keys() >= THOROUGH
    assert set().union(*map(verbs_of, CASES.values())) >= EVERYWHERE >= OF_METHODS


@pytest.mark.parametrize(("verb", "case"), [*cells()])
def test_verb(verb, case, tmp_path):
    verbs_of(CASES[case])[verb](CASES[case], tmp_path)


def _without(placement):
    def at(layer, where, adapters=None, original=BottleneckLayer.at):
        return [] if where == placement else original(layer, where, adapters)

    return at


# One bug for each kind of answer the oracle gives: the cell that must notice it.
BUGS = {
    "an adapter that is not applied": (
        *("rand-llama", "set_adapter of several"),
        *(SparseLayer, "active_adapters", property(lambda layer: layer._active_adapter[:1])),
    ),
    "a merge that is not undone": (
        *("rand-llama", "merge_adapter, unmerge_adapter"),
        *(SparseLayer, "restore", lambda layer, parameter=None: None),
    ),
    "disabled adapters that still act": (
        *("rand-llama", "disable_adapter"),
        *(SparseLayer, "disable_adapters", property(lambda layer: False)),
    ),
    "examples that swap their adapters": (
        *("rand-llama", "adapter_names", SparseLayer, "_mixed_batch_forward"),
        lambda layer, x, *, adapter_names, original=SparseLayer._mixed_batch_forward: original(
            layer, x, adapter_names=adapter_names[::-1]
        ),
    ),
    "a norm without its adapter": (
        *("pfeiffer on post-norm", "set_adapter of several", BottleneckLayer, "at", _without("norm")),
    ),
    "a block without its hook": (
        *("pfeiffer on pre-norm", "add_adapter, set_adapter", BottleneckLayer, "at", _without("block")),
    ),
    "a stack in the wrong order": (
        *("houlsby", "set_adapter of several", BottleneckLayer, "at"),
        lambda layer, where, adapters=None, original=BottleneckLayer.at: original(layer, where, adapters)[::-1],
    ),
    "disabled bottlenecks that still act": (
        *("pfeiffer on post-norm", "disable_adapter", BottleneckLayer, "at"),
        lambda layer, where, adapters=None, original=BottleneckLayer.at: original(
            layer, where, layer.active_adapters if adapters is None else adapters
        ),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_table_notices(bug, monkeypatch, tmp_path):
    name, verb, layer, attribute, wrong = BUGS[bug]
    case = CASES[name]
    verbs_of(case)[verb](case, tmp_path)
    monkeypatch.setattr(layer, attribute, wrong)
    with pytest.raises(AssertionError):
        verbs_of(case)[verb](case, tmp_path)


@pytest.mark.parametrize("name", ["rand-llama", *bottleneck.REQUESTS, *madg.REQUESTS])
def test_the_oracle_is_not_the_base_model(name):
    # Were the adapters lost on the way into the oracle, every cell would compare the base model with itself.
    case = CASES[name]
    model = case.model()
    assert (expected(case, case.part(model)) - logits(case.base())).abs().max() > 1e-2
    for parameter in case.parameters(model):
        parameter.data.zero_()
    # Of sparse deltas the oracle refuses those without weights.
    zero = logits(model) if case.is_mergeable else expected(case, case.part(model))
    torch.testing.assert_close(zero, logits(case.base()))


def test_the_oracle_tells_languages_apart():
    case = MadGCase("MAD-G")
    model = case.model()
    found = [case.expected(model, code) for code in VECTORS]
    for one in range(len(found)):
        assert all((found[one] - other).abs().max() > 1e-3 for other in found[:one])

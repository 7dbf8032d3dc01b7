"""PEFT's verbs over all our configs, as one table; every cell compares with the dense model W + delta in float64."""

from __future__ import annotations

import pytest
import torch

from peft_sparse import iter_deltas
from peft_sparse.tuners.sparse_ft.layers.base import SparseLayer
from tests.support.sparse import REQUESTS, Case, logits
from tests.support.verbs import VERBS

# PEFT warns about switching while merged, transformers about a name of its own that PEFT uses: none of it is ours.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("verb", VERBS)
def test_verb(verb, request_, kind, tmp_path):
    VERBS[verb](Case(kind, request_), tmp_path)


# One bug for each kind of answer the oracle gives: the cell that must notice it.
BUGS = {
    "an adapter that is not applied": (
        "set_adapter of several",
        "active_adapters",
        property(lambda layer: layer._active_adapter[:1]),
    ),
    "a merge that is not undone": ("merge_adapter, unmerge_adapter", "restore", lambda layer, parameter=None: None),
    "disabled adapters that still act": ("disable_adapter", "disable_adapters", property(lambda layer: False)),
    "examples that swap their adapters": (
        "adapter_names",
        "_mixed_batch_forward",
        lambda layer, x, *, adapter_names, original=SparseLayer._mixed_batch_forward: original(
            layer, x, adapter_names=adapter_names[::-1]
        ),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_the_table_notices(bug, monkeypatch, tmp_path):
    verb, attribute, wrong = BUGS[bug]
    case = Case("llama", "rand")
    VERBS[verb](case, tmp_path)
    monkeypatch.setattr(SparseLayer, attribute, wrong)
    with pytest.raises(AssertionError):
        VERBS[verb](case, tmp_path)


def test_the_oracle_is_not_the_base_model():
    # Were the deltas lost on the way into the oracle, every cell would compare the base model with itself.
    case = Case("llama", "rand")
    model = case.model()
    assert (logits(model) - logits(case.base())).abs().max() > 1e-2
    with torch.no_grad():
        for _, _, _, delta in iter_deltas(model, "default"):
            delta.values.zero_()
    assert torch.equal(logits(model), logits(case.base()))

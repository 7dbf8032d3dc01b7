"""Merging finite values that are infinite in the dtype of the base weights."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from peft_sparse import ConfigError, iter_deltas
from peft_sparse.tuners.ada_sft.model import iter_masked
from tests.support.adapters import tuned
from tests.support.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")
VERBS = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_adapter": lambda model: model.merge_adapter() or model,
}


def with_value(kind: str, value: float, dtype: torch.dtype, values_dtype: str = "float32") -> PeftModel:
    """A model in `dtype` of whose last targeted weight one entry is changed by `value`."""
    fields = {"values_dtype": values_dtype} if kind == "all" else {}
    model = tuned(kind, llama().to(dtype), **fields)
    if kind == "all":
        list(iter_deltas(model))[-1][-1].values.data[0] = value
        return model
    masked = list(iter_masked(model, "default"))[-1][-1]
    masked.enter("weights")
    masked.scores.data.fill_(9.0)
    masked.difference.data[0, 0] = value
    return model


@pytest.mark.parametrize("kind", ["all", "ada"])
@pytest.mark.parametrize("verb", VERBS)
def test_what_float16_cannot_hold_is_not_merged(kind, verb):
    model = with_value(kind, 70_000.0, torch.float16)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ConfigError, match=r"leaves the range of torch.float16 \(up to 65504\).*bfloat16 or float32"):
        VERBS[verb](model)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], parameter) for name, parameter in before.items())
    assert not any(getattr(module, "merged", False) for module in model.modules())


@pytest.mark.parametrize("kind", ["all", "ada"])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_the_weights_can_hold_is_merged(kind, verb, dtype):
    model = VERBS[verb](with_value(kind, 70_000.0, dtype))
    own = [parameter.detach() for name, parameter in model.named_parameters() if ".default." not in name]
    # An open mask of Ada-SFT is a little above one.
    assert float(max(parameter.abs().max() for parameter in own)) == pytest.approx(70_000.0, rel=0.15)


def test_float64_values_on_float32_weights():
    with pytest.raises(ConfigError, match=r"leaves the range of torch\.float32"):
        with_value("all", 1e300, torch.float32, values_dtype="float64").merge_and_unload()


@pytest.mark.parametrize("kind", ["all", "ada"])
def test_what_is_broken_already_is_merged_as_peft_merges_it(kind):
    merged = with_value(kind, float("nan"), torch.float16).merge_and_unload()
    assert sum(int(parameter.isnan().sum()) for parameter in merged.parameters()) == 1


@pytest.mark.parametrize("refused", [True, False])
@pytest.mark.parametrize("safe_merge", [True, False])
def test_what_a_merge_has_read_serves_no_later_one(refused, safe_merge):
    value = 70_000.0 if refused else 1.0
    model = with_value("all", value, torch.float16)
    base = dict(model.get_base_model().named_parameters())
    if refused:
        with pytest.raises((ConfigError, ValueError)):
            model.merge_adapter(safe_merge=safe_merge)
        list(iter_deltas(model))[-1][-1].values.data[0] = 1.0
    else:
        model.merge_adapter(safe_merge=safe_merge)
        model.unmerge_adapter()
    with torch.no_grad():
        for parameter in base.values():
            parameter.data.add_(0.5)
    changed = {name: parameter.clone() for name, parameter in base.items()}
    layers = model.base_model.tuned_layers()
    for layer in layers:
        layer.merge()
    assert not all(torch.equal(parameter, changed[name]) for name, parameter in base.items())
    for layer in layers:
        layer.unmerge()
    assert all(torch.equal(parameter, changed[name]) for name, parameter in base.items())

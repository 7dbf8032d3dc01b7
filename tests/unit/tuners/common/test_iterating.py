"""Walking over the adapters of a model by a name that it does not have finds nothing, and says so."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from peft_sparse import ConfigError, bottleneck_weights, iter_deltas
from peft_sparse.tuners.ada_sft.iteration import iter_masked
from peft_sparse.tuners.madg.model import iter_sites
from tests.support.adapters import TYPES, adapted
from tests.support.models import llama

pytestmark = pytest.mark.filterwarnings("ignore")
WALKS = {"SPARSE_FT": iter_deltas, "ADA_SFT": iter_masked, "BOTTLENECK": bottleneck_weights, "MAD_G": iter_sites}


@pytest.mark.parametrize("kind", TYPES)
def test_an_adapter_that_is_not_there_is_refused_by_name(kind):
    model = adapted(kind, llama(), "language", "task")
    for walk in WALKS.values():
        for carrier in (model, model.base_model, model.get_base_model()):
            with pytest.raises(ConfigError, match=r"one of \['language', 'task'\], got 'taks'\. Did you mean 'task'\?"):
                list(walk(carrier, "taks"))
    for own, walk in WALKS.items():  # of another type there is nothing to see
        assert bool(list(walk(model, "task"))) == (own == kind)


def test_a_model_without_such_adapters_has_none_to_walk_over():
    assert not list(iter_deltas(llama()))
    lora = get_peft_model(llama(), LoraConfig(r=1, target_modules=["q_proj"]), adapter_name="lora")
    assert not list(iter_deltas(lora, "lora"))
    with pytest.raises(ConfigError, match=r"one of \['lora'\], got 'default'"):
        list(iter_deltas(lora))

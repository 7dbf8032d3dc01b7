"""`PeftModel.set_adapter` with a list, for all tuner types."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_sparse import ConfigError
from peft_sparse._peft_bridge import take_several_adapters
from tests.support.adapters import TYPES, adapted
from tests.support.models import llama, logits

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind", TYPES)
def test_a_list_of_adapters_acts_as_it_does_on_the_tuner(kind):
    model = adapted(kind, llama(), "a", "b", task_type="CAUSAL_LM")
    alone = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        alone[name] = logits(model)
    model.base_model.set_adapter(["a", "b"])
    expected = logits(model)
    model.set_adapter("a")

    model.set_adapter(["a", "b"])

    assert model.active_adapters == ["a", "b"]
    assert torch.equal(logits(model), expected)
    assert not any(torch.allclose(expected, one) for one in alone.values())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), expected)
    model.set_adapter("a")
    assert model.active_adapters == ["a"]
    assert torch.equal(logits(model), alone["a"])


@pytest.mark.parametrize("kind", TYPES)
def test_deleting_the_last_of_three_leaves_two(kind):
    model = adapted(kind, llama(), "a", "b", "c", task_type="CAUSAL_LM")
    model.set_adapter(["a", "b"])
    expected = logits(model)

    model.set_adapter(["a", "b", "c"])
    model.delete_adapter("c")

    assert model.active_adapters == ["a", "b"]
    assert torch.equal(logits(model), expected)


def test_a_frozen_list_trains_nothing_and_a_plain_one_all():
    model = adapted("SPARSE_FT", llama(), "a", "b")
    model.set_adapter(["a", "b"], inference_mode=True)
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    model.set_adapter(("a", "b"))
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"a", "b"}


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["a", "bb"], r"adapter 'bb' is not in the model, which has \['a', 'b'\]"),
        ([], r"with model.disable_adapter\(\)"),
    ],
)
def test_a_list_that_cannot_be_had_changes_nothing(names, error):
    model = adapted("SPARSE_FT", llama(), "a", "b")
    with pytest.raises(ConfigError, match=error):
        model.set_adapter(names)
    assert model.active_adapters == ["a"]


def test_other_tuners_keep_what_peft_does():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError):
        model.set_adapter(["default"])
    before = PeftModel.set_adapter
    take_several_adapters()
    assert PeftModel.set_adapter is before


@pytest.mark.parametrize("kind", TYPES)
def test_a_verb_refuses_an_adapter_that_is_not_there_and_changes_nothing(kind):
    model = adapted(kind, llama(), "a", "b")
    expected, tuner = logits(model), model.base_model
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    for verb in (
        *(lambda: tuner.set_adapter("bb"), lambda: tuner.set_adapter(["a", "bb"])),
        *(lambda: model.set_requires_grad("bb", requires_grad=False), lambda: model.set_requires_grad(["b", "bb"])),
        *(lambda: model.merge_adapter(["a", "bb"]), lambda: model.merge_and_unload(adapter_names=["a", "bb"])),
    ):
        with pytest.raises(
            ValueError, match=r"adapter 'bb' is not in the model, which has \['a', 'b'\]|cannot be merged"
        ):
            verb()
    with pytest.raises(TypeError, match="list of strings"):
        model.merge_and_unload(adapter_names="bb")
    assert torch.equal(logits(model), expected)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trains


@pytest.mark.parametrize("kind", TYPES)
def test_an_adapter_that_is_named_twice_acts_once(kind):
    model = adapted(kind, llama(), "a", "b")
    expected = logits(model)
    model.base_model.set_adapter(["a", "a"])
    assert torch.equal(logits(model), expected)
    if kind in ("SPARSE_FT", "ADA_SFT"):
        model.merge_adapter(["a", "a"])
        torch.testing.assert_close(logits(model), expected)
        model.unmerge_adapter()
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["a", "a"])), expected)

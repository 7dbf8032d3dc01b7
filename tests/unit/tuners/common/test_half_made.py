"""What fails while an adapter is made leaves the model as it was: for all tuner types, wherever it fails."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from peft_sparse import ConfigError
from peft_sparse.tuners.common import combining
from tests.support.adapters import TYPES, config
from tests.support.models import llama, picture

CONFIGS = {kind: partial(config, kind) for kind in TYPES}
ADDED_UP = [kind for kind in CONFIGS if kind != "MAD_G"]
HEADS = {"modules_to_save": ["lm_head"]}
# Fields of an adapter, and of one that also goes where that does not.
ELSEWHERE = {
    "SPARSE_FT": ({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "ADA_SFT": ({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "v_proj"]}),
    "BOTTLENECK": ({"kind": "pfeiffer"}, {"kind": "houlsby"}),
    "MAD_G": ({"kind": "pfeiffer"}, {"kind": "houlsby"}),
}


class OutOfMemory(RuntimeError):
    """What torch would say."""


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Let a function fail in one of its calls, after it has done its work."""
    real, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        result = real(*args, **kwargs)
        calls.append(name)
        if len(calls) == call:
            raise OutOfMemory(name)
        return result

    monkeypatch.setattr(owner, name, failing)


def two_adapters(kind: str, **fields):
    torch.manual_seed(1)
    model = get_peft_model(llama(), CONFIGS[kind](), adapter_name="a")
    model.add_adapter("b", CONFIGS[kind](**fields))
    return model.eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_with_adapters_is_given_no_second_time(kind):
    model = two_adapters(kind)
    before, own = picture(model), model.peft_config["a"]
    for wrapped in (model, torch.compile(model, backend="eager")):
        with pytest.raises(ConfigError, match=r"is a PeftModel already.*add_adapter\(name, config\).*unload\(\)"):
            get_peft_model(wrapped, CONFIGS[kind](), adapter_name="a")
    assert picture(model) == before
    assert model.peft_config["a"] is own


@pytest.mark.filterwarnings("ignore:.*second time:UserWarning", "ignore:Already found a:UserWarning")
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("call", [0, 1, 2])
def test_an_adapter_survives_if_one_of_its_name_fails_on_its_base_model(monkeypatch, kind, call):
    model = two_adapters(kind, **HEADS)
    model.set_adapter("b")
    before, own = picture(model), model.peft_config["b"]
    if call:
        fail_at(monkeypatch, PEFT_TYPE_TO_TUNER_MAPPING[kind], "_create_and_replace", call)
    wrong = {} if call else {"exclude_modules": ".*"}
    with pytest.raises(Exception, match="_create_and_replace" if call else "exclude|matches no module"):
        get_peft_model(model.get_base_model(), CONFIGS[kind](**wrong), adapter_name="b")
    assert picture(model) == before
    assert model.peft_config["b"] is own


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("call", [1, 2])
def test_a_first_adapter_that_fails_midway_leaves_the_base_model(monkeypatch, kind, call):
    model = llama()
    model.model.norm.weight.requires_grad_(False)
    before = picture(model)
    fail_at(monkeypatch, PEFT_TYPE_TO_TUNER_MAPPING[kind], "_create_and_replace", call)
    with pytest.raises(OutOfMemory):
        get_peft_model(model, CONFIGS[kind]())
    assert picture(model) == before
    monkeypatch.undo()
    assert get_peft_model(model, CONFIGS[kind]()).active_adapters == ["default"]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("name", "call"), [("_create_and_replace", 2), ("_complete", 1)])
def test_another_adapter_that_fails_midway_leaves_the_others(monkeypatch, kind, name, call):
    model = two_adapters(kind)
    before = picture(model)
    fail_at(monkeypatch, PEFT_TYPE_TO_TUNER_MAPPING[kind], name, call)
    with pytest.raises(OutOfMemory):
        model.add_adapter("c", CONFIGS[kind](**HEADS))
    assert picture(model) == before
    monkeypatch.undo()
    model.add_adapter("c", CONFIGS[kind]())
    model.set_adapter("c")


@pytest.mark.parametrize("kind", CONFIGS)
def test_another_adapter_that_fails_leaves_no_layer_behind(monkeypatch, kind):
    first, second = ELSEWHERE[kind]
    torch.manual_seed(1)
    model = get_peft_model(llama(), CONFIGS[kind](**first)).eval()
    before = picture(model)
    fail_at(monkeypatch, PEFT_TYPE_TO_TUNER_MAPPING[kind], "_complete", 1)
    with pytest.raises(OutOfMemory):
        model.add_adapter("c", CONFIGS[kind](**second))
    assert picture(model) == before


@pytest.mark.parametrize("kind", ADDED_UP)
@pytest.mark.parametrize("where", ["injection", "the sum", "heads"])
def test_a_sum_that_fails_leaves_the_adapters(monkeypatch, kind, where):
    model = two_adapters(kind, **HEADS)
    before = picture(model)
    cls = PEFT_TYPE_TO_TUNER_MAPPING[kind]
    if where == "injection":
        fail_at(monkeypatch, cls, "_create_and_replace", 2)
    elif where == "heads":
        fail_at(monkeypatch, combining, "copy_heads", 1)
    else:
        real = cls._combine

        def combine(self, *args, **kwargs):
            config, write = real(self, *args, **kwargs)

            def half(adapter_name: str) -> None:
                write(adapter_name)
                raise OutOfMemory("half way")

            return combining.Combined(config, half)

        monkeypatch.setattr(cls, "_combine", combine)
    with pytest.raises(OutOfMemory):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")
    assert picture(model) == before
    monkeypatch.undo()
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum")
    assert list(model.peft_config) == ["a", "b", "sum"]
    assert model.active_adapters == ["a"]


@pytest.mark.parametrize("kind", ["SPARSE_FT", "ADA_SFT"])
def test_a_sum_that_its_dtype_does_not_hold_is_refused(kind):
    model = two_adapters(kind)
    before = picture(model)
    with pytest.raises(
        ConfigError, match=r"holds \d+ values that are infinite or NaN: torch\.float32 holds numbers up to 3"
    ):
        model.add_weighted_adapter(["a", "b"], [3e42, 3e42], "sum")
    assert picture(model) == before


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((["a", "nobody"], [1.0, 1.0], "sum"), "adapters must name adapters of this model"),
        ((["a", "b"], [1.0], "sum"), "one number per adapter, got 1 for 2"),
        ((["a", "b"], [1.0, float("nan")], "sum"), "finite numbers, got"),
        ((["a", "b"], [1.0, "0.5"], "sum"), "finite numbers, got"),
        ((["a", "b"], [1.0, 1.0], "b"), "is taken"),
        ((["a", "b"], [1.0, 1.0], "x.y"), "without a dot"),
        ((["a", "b"], [1.0, 1.0], "sum", "svd"), "combination_type must be"),
    ],
)
def test_a_sum_that_is_refused_leaves_the_adapters(kind, arguments, said):
    model = two_adapters(kind)
    before = picture(model)
    with pytest.raises(ConfigError, match="cannot be averaged" if kind == "MAD_G" else said):
        model.add_weighted_adapter(*arguments)
    assert picture(model) == before

"""PEFT's verbs over MAD-G adapters, as one table; the cells compare with the thesis' formulas in float64."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer

from peft_sparse import MadGConfig, MadGModel, generate_adapter, set_language
from peft_sparse.tuners.madg.layer import MadGLayer
from peft_sparse.tuners.madg.model import iter_sites
from tests.support.bottleneck import IDS, close, logits
from tests.support.madg import VECTORS, MadGCase, fill_generators, generator_parameters, plain

# PEFT warns about adapter names, transformers about a name of its own that PEFT uses: none of it is ours.
pytestmark = pytest.mark.filterwarnings("ignore")


def same_names(model: torch.nn.Module, base: torch.nn.Module) -> None:
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def get(case: MadGCase, folder: Path) -> None:
    config = case.config(init_weights=True)
    request = copy.deepcopy(config)
    model = get_peft_model(case.base(), config).eval()
    assert isinstance(model.base_model, MadGModel)
    assert config == request, "the user's config is not changed"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".mad_g_generators.default." in name for name in trained)
    model.set_language("quy")
    found = logits(model)
    assert not torch.equal(found, logits(case.base()))
    torch.testing.assert_close(found, logits(case.base()), rtol=0, atol=0.05)


def add_and_switch(case: MadGCase, folder: Path) -> None:
    model = case.model("one", "two")
    model.set_language("quy")
    close(logits(model), case.expected(model, "quy", "one"))
    model.set_adapter("two")
    close(logits(model), case.expected(model, "quy", "two"))
    model.set_adapter("one")
    close(logits(model, language="ace"), case.expected(model, "ace", "one"))
    assert (case.expected(model, "quy", "one") - case.expected(model, "quy", "two")).abs().max() > 1e-3


def disable(case: MadGCase, folder: Path) -> None:
    model = case.model()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(case.base()))
        assert torch.equal(logits(model, language="quy"), logits(case.base()))
    close(logits(model, language="quy"), case.expected(model, "quy"))


def delete(case: MadGCase, folder: Path) -> None:
    model = case.model("one", "two")
    model.set_language("quy")
    expected = case.expected(model, "quy", "two")
    model.delete_adapter("one")
    close(logits(model), expected)
    assert list(model.peft_config) == ["two"]
    assert not any(".one." in key for key in model.state_dict())
    model.add_adapter("one", case.config(), autocast_adapter_dtype=False)
    fill_generators(model, "one", 5)
    model.set_adapter("one")
    close(logits(model), case.expected(model, "quy", "one"))


def save_and_load(case: MadGCase, folder: Path) -> None:
    model = case.model("one", "two")
    model.set_language(["quy", "ace", "quy"])
    logits(model)
    model.set_adapter("two")
    logits(model)
    expected = {name: case.expected(model, "quy", name) for name in ("one", "two")}
    model.save_pretrained(folder)
    size = (folder / "one" / "adapter_model.safetensors").stat().st_size
    assert size < 8 * sum(p.numel() for _, p in generator_parameters(model, "one")) + 4000, "nothing but the adapter"
    assert "import peft_sparse" in (folder / "one" / "README.md").read_text()
    for lean in (False, True):
        options = {"low_cpu_mem_usage": lean, "autocast_adapter_dtype": False}
        loaded = PeftModel.from_pretrained(case.base(), folder / "one", **options).eval()
        close(logits(loaded, language="quy"), expected["one"])
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        loaded.load_adapter(folder / "two", adapter_name="second", **options)
        loaded.set_language("quy")
        close(logits(loaded), expected["one"])
        loaded.set_adapter("second")
        close(logits(loaded), expected["two"])
    loaded = PeftModel.from_pretrained(case.base(), folder / "one", is_trainable=True)
    assert all(parameter.requires_grad for _, parameter in generator_parameters(loaded))


def merging_is_refused(case: MadGCase, folder: Path) -> None:
    model = case.model(language="quy")
    with pytest.raises(ValueError, match=r"cannot be merged: .* merge_and_unload\(\) gives a model"):
        model.merge_adapter()
    close(logits(model), case.expected(model, "quy"))


def bake(case: MadGCase, folder: Path) -> None:
    model = case.model("one", "two")
    model.set_language("ace")
    expected = case.expected(model, "ace", "two", "one")
    baked = model.merge_and_unload(adapter_names=["two", "one"], safe_merge=True)
    assert type(baked) is type(case.base())
    assert not any(isinstance(module, BaseTunerLayer) for module in baked.modules())
    assert not any("generator" in name for name, _ in baked.named_parameters()), "the hypernetwork is gone"
    close(logits(baked), expected)
    buffer = io.BytesIO()
    torch.save(baked, buffer)
    close(logits(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)), expected)
    assert not baked._forward_hooks
    assert not baked._forward_pre_hooks


def safe_baking_refuses_nan(case: MadGCase, folder: Path) -> None:
    model = case.model(language="quy")
    generator_parameters(model)[0][1].data.view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert generator_parameters(model)


def unload(case: MadGCase, folder: Path) -> None:
    plain_model = case.model("one", "two").unload()
    assert type(plain_model) is type(case.base())
    same_names(plain_model, case.base())
    assert torch.equal(logits(plain_model), logits(case.base()))


def one_adapter_per_example(case: MadGCase, folder: Path) -> None:
    model = case.model("one", "two")
    model.set_language("quy")
    rows = [case.expected(model, "quy", "two"), logits(case.base()), case.expected(model, "quy", "one")]
    found = logits(model, adapter_names=["two", "__base__", "one"])
    close(found, torch.stack([row[i] for i, row in enumerate(rows)]))


def inject(case: MadGCase, folder: Path) -> None:
    source = case.model()
    for lean in (False, True):
        model = inject_adapter_in_model(case.config(), case.base(), low_cpu_mem_usage=lean)
        outcome = set_peft_model_state_dict(model, get_peft_model_state_dict(source), low_cpu_mem_usage=lean)
        assert not outcome.unexpected_keys
        double(model)
        model.eval()
        set_language(model, "quy")
        close(logits(model), case.expected(source, "quy"))
        close(logits(model, language="ace"), case.expected(source, "ace"))
        state = get_peft_model_state_dict(model)
        assert state.keys() == {key.removeprefix("base_model.model.") for key in get_peft_model_state_dict(source)}


def through_transformers(case: MadGCase, folder: Path) -> None:
    source = case.model(language="quy")
    logits(source)
    source.save_pretrained(folder / "peft")
    model = case.base()
    model.load_adapter(folder / "peft", adapter_name="loaded")
    double(model)
    set_language(model, "quy")
    close(logits(model), case.expected(source, "quy"))
    model.add_adapter(case.config(), adapter_name="added")
    double(model)
    fill_generators(model, "added", 5)
    close(logits(model), case.expected(model, "quy", "added"))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(case.base()))
    model.enable_adapters()
    model.set_adapter("loaded")
    close(logits(model), case.expected(source, "quy"))
    adapter = generate_adapter(model, "quy")
    wanted = source.generate_adapter("quy")
    for path, weights in adapter.weights.items():
        close(weights.up_weight, wanted.weights[path].up_weight)


def double(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, MadGLayer):
            module.mad_g_generators.double()


def status(case: MadGCase, folder: Path) -> None:
    model = case.model("one", "two")
    whole = get_model_status(model)
    assert (whole.active_adapters, whole.enabled, whole.merged_adapters) == (["one"], True, [])
    assert whole.peft_types == {"one": "MAD_G", "two": "MAD_G"}
    assert whole.trainable_params == sum(p.numel() for _, p in generator_parameters(model, "one"))
    assert len(get_layer_status(model)) == len(dict(iter_sites(model, "one")))


def pickled(case: MadGCase, folder: Path) -> None:
    model = case.model(language="quy")
    for config in (case.config(), model.peft_config["default"]):
        assert pickle.loads(pickle.dumps(config)) == config
        config.save_pretrained(folder)
        loaded = PeftConfig.from_pretrained(folder)
        assert type(loaded) is MadGConfig
        assert loaded == config
    buffer = io.BytesIO()
    torch.save(model, buffer)
    again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    close(logits(again, language="ace"), case.expected(model, "ace"))
    close(logits(again), case.expected(model, "quy"))


def generate(case: MadGCase, folder: Path) -> None:
    if not case.bottleneck.is_decoder:
        return
    model = case.model()
    twin = case.twin(plain(model), language="quy")
    for options in ({}, {"num_beams": 3}):
        arguments = {"input_ids": IDS[:, :2], "max_new_tokens": 6, "do_sample": False, **options}
        with model.set_language("quy"):
            assert torch.equal(model.generate(**arguments), twin.generate(**arguments))


def train_save_resume(case: MadGCase, folder: Path) -> None:
    model = case.model().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in generator_parameters(model)}
    for language in ("quy", "ace"):
        model(input_ids=IDS, labels=IDS, language=language).loss.backward()
    optimizer.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in generator_parameters(model))
    expected = case.expected(model, "quy")
    model.save_pretrained(folder)
    fill_generators(model, "default", 9)
    # What transformers' Trainer does to resume: load into the adapter that is there.
    model.load_adapter(folder, adapter_name="default", is_trainable=True)
    close(logits(model.eval(), language="quy"), expected)


def reference_for_dpo(case: MadGCase, folder: Path) -> None:
    # What trl's DPOTrainer does: the same config object, then the values by the adapter's name in the parameter's.
    model = case.model(language="quy")
    model.add_adapter("ref", model.peft_config["default"], autocast_adapter_dtype=False)
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    close(logits(model), case.expected(model, "quy", "default"))


VERBS: dict[str, Callable[[MadGCase, Path], None]] = {
    "get_peft_model": get,
    "add_adapter, set_adapter": add_and_switch,
    "disable_adapter": disable,
    "delete_adapter": delete,
    "save_pretrained, from_pretrained, load_adapter": save_and_load,
    "merge_adapter": merging_is_refused,
    "merge_and_unload": bake,
    "safe_merge": safe_baking_refuses_nan,
    "unload": unload,
    "adapter_names": one_adapter_per_example,
    "inject_adapter_in_model": inject,
    "transformers' own verbs": through_transformers,
    "get_model_status, get_layer_status": status,
    "pickle, torch.save": pickled,
    "generate": generate,
    "train, save, resume": train_save_resume,
    "DPO's reference adapter": reference_for_dpo,
}


@pytest.mark.parametrize("request_", ["MAD-G", "MAD-G-LS", "MAD-G on pre-norm"])
@pytest.mark.parametrize("verb", VERBS)
def test_verb(verb, request_, tmp_path):
    VERBS[verb](MadGCase(request_), tmp_path)


def test_the_oracle_tells_languages_apart():
    case = MadGCase("MAD-G")
    model = case.model()
    found = [case.expected(model, code) for code in VECTORS]
    for one in range(len(found)):
        assert all((found[one] - other).abs().max() > 1e-3 for other in found[:one])

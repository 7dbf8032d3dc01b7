"""PEFT's verbs over MAD-G adapters in several languages; `common/test_verbs.py` tries all of them in one."""

from __future__ import annotations

import io

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

from peft_sparse import ConfigError, generate_adapter, set_language
from tests.support.exact import IDS, close, logits
from tests.support.madg import MadGCase, fill_generators, generator_parameters, plain

# PEFT warns about adapter names, transformers about a name of its own that PEFT uses: none of it is ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.parametrize(
        "case", [MadGCase(r) for r in ("MAD-G", "MAD-G-LS", "MAD-G on pre-norm")], ids=lambda c: c.request
    ),
]


def test_adapters_are_switched_under_a_language_and_languages_under_an_adapter(case):
    model = case.model("one", "two")
    model.set_language("quy")
    close(logits(model), case.expected(model, "quy", "one"))
    model.set_adapter("two")
    close(logits(model), case.expected(model, "quy", "two"))
    model.set_adapter("one")
    close(logits(model, language="ace"), case.expected(model, "ace", "one"))
    with model.disable_adapter():
        assert torch.equal(logits(model, language="quy"), logits(case.base()))


def test_files_hold_no_language_of_a_batch(case, tmp_path):
    model = case.model("one", "two")
    model.set_language(["quy", "ace", "quy"])
    for name in ("one", "two"):  # files hold the vectors that an adapter has used
        model.set_adapter(name)
        logits(model)
    expected = {name: case.expected(model, "quy", name) for name in ("one", "two")}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "one", **case.exact).eval()
    close(logits(loaded, language="quy"), expected["one"])
    loaded.load_adapter(tmp_path / "two", adapter_name="second", **case.exact)
    loaded.set_language("quy")
    loaded.set_adapter("second")
    close(logits(loaded), expected["two"])


def test_what_is_baked_is_of_the_language_that_is_set(case):
    model = case.model("one", "two")
    model.set_language("ace")
    expected = case.expected(model, "ace", "two", "one")
    close(logits(model.merge_and_unload(adapter_names=["two", "one"], safe_merge=True)), expected)


def test_an_injected_or_loaded_adapter_speaks_every_language(case, tmp_path):
    source = case.model(language="quy")
    model = inject_adapter_in_model(case.config(), case.base())
    set_peft_model_state_dict(model, get_peft_model_state_dict(source))
    double = MadGCase(case.request, language="quy").ready
    close(logits(double(model)), case.expected(source, "quy"))
    close(logits(model, language="ace"), case.expected(source, "ace"))
    source.save_pretrained(tmp_path)
    model = case.base()
    model.load_adapter(tmp_path)
    adapter, wanted = generate_adapter(double(model), "quy"), source.generate_adapter("quy")
    for path, weights in adapter.weights.items():
        close(weights.up_weight, wanted.weights[path].up_weight)


def test_a_saved_model_keeps_its_language_and_takes_others(case):
    model = case.model(language="quy")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    again = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    close(logits(again, language="ace"), case.expected(model, "ace"))
    close(logits(again), case.expected(model, "quy"))


def test_generation_under_a_language_that_is_set_for_it(case):
    if not case.is_decoder:
        pytest.skip("an encoder does not generate")
    model = case.model()
    twin = case.twin(plain(model), language="quy")
    with model.set_language("quy"):
        for options in ({}, {"num_beams": 3}):
            arguments = {"input_ids": IDS[:, :2], "max_new_tokens": 6, "do_sample": False, **options}
            assert torch.equal(model.generate(**arguments), twin.generate(**arguments))


def test_training_on_two_languages_moves_everything_and_resumes(case, tmp_path):
    model = case.model().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in generator_parameters(model)}
    for language in ("quy", "ace"):
        model(input_ids=IDS, labels=IDS, language=language).loss.backward()
    optimizer.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in generator_parameters(model))
    expected = case.expected(model, "quy")
    model.save_pretrained(tmp_path)
    fill_generators(model, "default", 9)
    model.load_adapter(tmp_path, adapter_name="default", is_trainable=True)
    set_language(model, "quy")
    close(logits(model.eval()), expected)


def test_a_mixed_batch_may_be_of_several_languages(case):
    model = case.model("one", "two")
    ids, names, languages = IDS.repeat(2, 1)[:4], ["one", "two", "two", "__base__"], ["quy", "ace", "quy", "ace"]
    with torch.no_grad():
        found = model(input_ids=ids, adapter_names=names, language=languages).logits
    for row, (name, language) in enumerate(zip(names, languages, strict=True)):
        with torch.no_grad():
            alone = case.base() if name == "__base__" else model
            if name != "__base__":
                model.set_adapter(name)
            own = {} if name == "__base__" else {"language": language}
            close(found[row : row + 1], alone(input_ids=ids[row : row + 1], **own).logits)
    with pytest.raises(ConfigError, match=r"one language per example \(4\), got 3: \('quy', 'ace', 'quy'\)"):
        model(input_ids=ids, adapter_names=names, language=languages[:3])

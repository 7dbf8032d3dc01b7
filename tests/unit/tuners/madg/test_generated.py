"""MAD-G: what a hypernetwork generates, in a model of its own or built into the base model."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertModel

from peft_sparse import (
    BottleneckConfig,
    ConfigError,
    bottleneck_weights,
    generate_adapter,
    set_language,
)
from tests.support.adapters import adapted
from tests.support.bottleneck import Case, parameters_of
from tests.support.exact import IDS, close, logits
from tests.support.madg import MadGCase, fill_generators
from tests.support.models import bert

PLAIN, LAYERS = MadGCase("MAD-G"), MadGCase("MAD-G-LS")


def near(actual, expected):
    # A new bottleneck adapter is float32.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [PLAIN, LAYERS, MadGCase("MAD-G-LS, houlsby")], ids=lambda case: case.request)
def test_a_generated_adapter_is_an_ordinary_one(case, tmp_path):
    model = case.model("network")
    expected = case.expected(model, "bxr", "network")
    adapter = model.generate_adapter("bxr")
    assert (adapter.language, adapter.name) == ("bxr", "bxr")
    assert type(adapter.config) is BottleneckConfig
    assert all(not tensor.requires_grad for weights in adapter.weights.values() for tensor in weights)
    fill_generators(model, "network", 9)

    adapter.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, autocast_adapter_dtype=False).eval()
    assert loaded.peft_config["default"].peft_type == "BOTTLENECK"
    close(logits(loaded), expected)
    assert "import peft_sparse" in (tmp_path / "README.md").read_text()

    added = adapter.add_to(case.base()).eval()
    near(logits(added), expected)
    # It trains like any other: every weight and bias of it, and nothing else.
    added.train()(input_ids=IDS, labels=IDS).loss.backward()
    trained = [name for name, p in added.named_parameters() if p.requires_grad]
    assert len(trained) == 4 * len(adapter.weights)
    assert all(".bottleneck_adapters.bxr." in name for name in trained)
    assert all(p.grad is not None for _, p in parameters_of(added, "bxr"))
    # The hypernetwork is not its weights any more.
    for path, weights in bottleneck_weights(added, "bxr").items():
        near(weights.down_weight.double(), adapter.weights[path].down_weight)


def test_a_generated_adapter_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    model = PLAIN.model("network")
    model.generate_adapter("bxr").save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("Mine.\n")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    fill_generators(model, "network", 9)
    with monkeypatch.context() as patch:
        patch.setattr(BottleneckConfig, "save_pretrained", raising(OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            model.generate_adapter("bxr").save_pretrained(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    model.generate_adapter("bxr").save_pretrained(tmp_path / "out")
    assert "Mine." in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConfigError, match="begins with ~"):
        model.generate_adapter("bxr").save_pretrained("~/out")


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


def test_generated_adapters_stack_below_a_task():
    network = PLAIN.model()
    model = get_peft_model(PLAIN.base(), Case("pfeiffer on post-norm").config(), adapter_name="task").eval()
    before = logits(model)
    for language, seen in (("quy", model), ("ace", torch.compile(model, backend="eager"))):
        assert network.generate_adapter(language, adapter_name=f"{language} generated").add_to(seen) is model
    assert torch.equal(logits(model), before), "the task adapter alone is active still"
    found = {}
    for language in ("quy", "ace"):
        model.base_model.set_adapter([f"{language} generated", "task"])
        found[language] = logits(model)
        alone = network.generate_adapter(language).add_to(PLAIN.base()).eval()
        model.set_adapter(f"{language} generated")
        assert torch.equal(logits(model), logits(alone))
    assert (found["quy"] - found["ace"]).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="'quy generated' is taken"):
        network.generate_adapter("quy", adapter_name="quy generated").add_to(model)


def test_a_generated_adapter_that_does_not_fit_changes_nothing():
    network = PLAIN.model()
    with pytest.raises(ConfigError, match="a PeftModel holds one type, this one MAD_G"):
        network.generate_adapter("quy").add_to(network)
    wider = BertModel(BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    names = [name for name, _ in wider.named_modules()]
    with pytest.raises(ConfigError, match="must be"):
        network.generate_adapter("quy").add_to(wider)
    assert [name for name, _ in wider.named_modules()] == names
    assert all(parameter.requires_grad for parameter in wider.parameters())
    tuned = get_peft_model(wider, BottleneckConfig(bottleneck_size=2), adapter_name="task")
    with pytest.raises(ConfigError, match="must be"):
        network.generate_adapter("quy").add_to(tuned)
    assert list(tuned.peft_config) == ["task"]


@pytest.mark.parametrize("more", [{"trainable_token_indices": [3]}, {"modules_to_save": ["cls"]}])
def test_what_a_generated_adapter_leaves_behind_is_told(more, caplog):
    model = adapted("MAD_G", bert(), **more)
    model.generate_adapter("quy")
    assert f"neither heads nor trained tokens of 'default' ({next(iter(more))})" in caplog.text
    caplog.clear()
    adapted("MAD_G", bert()).generate_adapter("quy")
    assert not caplog.text


def test_which_hypernetwork_generates():
    model = PLAIN.model("one", "two")
    one = model.generate_adapter("quy")
    two = model.generate_adapter("quy", source="two")
    path = next(iter(one.weights))
    assert not torch.equal(one.weights[path].up_weight, two.weights[path].up_weight)
    assert torch.equal(
        generate_adapter(model, "quy", source="two").weights[path].up_weight, two.weights[path].up_weight
    )
    with pytest.raises(ConfigError, match=r"no MAD_G adapter 'three'; this model has \['one', 'two'\]"):
        model.generate_adapter("quy", source="three")
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ConfigError, match="2 MAD_G adapters are active"):
        model.generate_adapter("quy")
    with pytest.raises(ConfigError, match="'zzz' is not among"):
        model.generate_adapter("zzz", source="one")
    with pytest.raises(ConfigError, match="this model has no MAD_G adapter"):
        set_language(PLAIN.base(), "quy")


@pytest.mark.parametrize("case", [PLAIN, MadGCase("MAD-G on pre-norm")], ids=["post-norm", "pre-norm"])
def test_building_in_needs_one_language(case):
    model = case.model()
    for language, message in ((None, "no language is set"), (["quy", "ace", "eng"], "one language must be set")):
        if language is not None:
            model.set_language(language)
        with pytest.raises(ConfigError, match=message):
            model.merge_and_unload()
        close(logits(model, language="quy"), case.expected(model, "quy"))


def test_the_language_of_a_batch_is_over_with_it():
    model = PLAIN.model(language="eng")
    expected = PLAIN.expected(model, "ace")
    logits(model, language="quy")
    with torch.no_grad():
        # A part of the model by itself, as generate() runs encoders: it never sees the inputs of the whole.
        inside = model.base_model.model.bert(input_ids=IDS).last_hidden_state
        with model.set_language("quy"):
            assert not torch.allclose(inside, model.base_model.model.bert(input_ids=IDS).last_hidden_state)
    model.set_language("ace")
    close(logits(model.merge_and_unload()), expected)


def test_averaging_is_refused():
    model = PLAIN.model("one", "two")
    with pytest.raises(ConfigError, match="MAD-G adapters cannot be averaged"):
        model.base_model.add_weighted_adapter(["one", "two"], [1, 1], "mean")
    assert list(model.peft_config) == ["one", "two"]

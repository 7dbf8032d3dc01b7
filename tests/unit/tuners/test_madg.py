"""MAD-G: the request, its size and start, the language of a forward, and what is generated."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from bottleneck_case import IDS, Case, close, logits, parameters_of
from madg_case import NUM_FEATURES, VECTORS, MadGCase, fill_generators, generator_parameters
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertModel

from peft_sparse import (
    BottleneckConfig,
    ConfigError,
    FormatError,
    MadGConfig,
    Typology,
    bottleneck_weights,
    generate_adapter,
    set_language,
)
from peft_sparse.tuners.madg.model import iter_sites

PLAIN, LAYERS = MadGCase("MAD-G"), MadGCase("MAD-G-LS")


# ---- the request -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"language_dim": 0}, "language_dim must be a whole number >= 1, got 0"),
        ({"layer_dim": 2.5}, "layer_dim must be a whole number >= 1, got 2.5"),
        ({"bottleneck_size": 0}, "bottleneck_size must be a whole number"),
        ({"invertible": "nice"}, "generates no invertible adapters"),
        ({"scaling": "learned"}, "scaling must be a number for MAD-G"),
        ({"features": []}, "features must name sets"),
        ({"typology": 3}, "typology must be what load_typology"),
        ({"typology": {}}, "must be one or more and of one length"),
        ({"typology": {"eng": [1.0], "quy": [1.0, 2.0]}}, "must be one or more and of one length"),
    ],
)
def test_requests_that_no_run_can_honour(fields, message):
    with pytest.raises(ConfigError, match=message):
        MadGConfig(**fields)


def test_one_generator_needs_layers_of_one_width():
    model = torch.nn.ModuleDict({str(i): torch.nn.Linear(4, 4 + i) for i in range(2)})
    config = MadGConfig(target_modules=["0", "1"], kind="houlsby", layer_dim=2, typology=VECTORS)
    with pytest.raises(ConfigError, match=r"needs layers of one width, this model's have \[4, 5\]"):
        get_peft_model(model, config)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize(("layer_dim", "generator"), [(None, 2 * 768 * 384 * 12 * 32), (32, 2 * 768 * 384 * (32 + 32))])
def test_sizes_at_mbert_are_the_thesis_s(layer_dim, generator):
    with torch.device("meta"):
        base = BertModel(BertConfig(vocab_size=119547))
    config = MadGConfig(layer_dim=layer_dim, typology={"eng": torch.ones(289)})
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    sizes: dict[str, int] = {}
    for name, parameter in generator_parameters(model):
        kind = name.rpartition(".")[2]
        sizes[kind] = sizes.get(kind, 0) + parameter.numel()
    expected = {"generator": generator, "language_projection": 32 * 289}
    assert sizes == (expected if layer_dim is None else {**expected, "layer_embedding": 12 * 32})
    assert round(generator / 1e6) == (226 if layer_dim is None else 38)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(sizes.values())


# ---- the start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_dim", [None, 16])
@pytest.mark.parametrize("known", [1, 0.5, 0.02])
def test_every_language_starts_near_the_identity(layer_dim, known):
    torch.manual_seed(0)
    num = 289
    vector = (torch.arange(num) < known * num).float()
    base = BertModel(BertConfig(vocab_size=9, hidden_size=64, num_hidden_layers=2, num_attention_heads=2))
    config = MadGConfig(bottleneck_size=32, layer_dim=layer_dim, typology={"xxx": vector})
    model = get_peft_model(base, config)
    weights = [w for site in dict(iter_sites(model)).values() for w in site.generate(["xxx"])[0]]
    matrices = [w for w in weights if w.dim() == 2]
    # The variance that the shapes promise: that of the language's share, and of the layer embedding's.
    share = vector.square().sum().item() / num
    expected = 0.01 * math.sqrt(share if layer_dim is None else (32 * share + 16) / 48)
    found = torch.cat([w.flatten() for w in matrices]).std().item()
    assert found == pytest.approx(expected, rel=0.35), "one draw of a language embedding stands behind all of them"
    assert found < 0.013
    assert all(not w.any() for w in weights if w.dim() == 1), "no biases"


def test_starting_at_the_identity():
    base = PLAIN.base()
    for case in (PLAIN, LAYERS):
        config = case.config(init="identity", init_weights=True, language="eng")
        model = get_peft_model(case.base(), config, autocast_adapter_dtype=False).eval()
        for language in VECTORS:
            close(logits(model, language=language), logits(base))
        # Yet it learns: the gradient reaches what generates the up-projections.
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        generators = [p.grad for name, p in generator_parameters(model) if name.endswith("generator")]
        assert all(grad[: len(grad) // 2].abs().sum() == 0 and grad[len(grad) // 2 :].any() for grad in generators)


# ---- the language of a forward ---------------------------------------------------------------------


def test_a_forward_needs_a_language():
    model = PLAIN.model()
    with pytest.raises(ConfigError, match="no language is set"):
        logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(PLAIN.base()))
    close(logits(model, language="quy"), PLAIN.expected(model, "quy"))
    with pytest.raises(ConfigError, match="no language is set"):
        logits(model)
    model = PLAIN.model(language="ace")
    assert model.language == "ace"
    close(logits(model), PLAIN.expected(model, "ace"))


def test_set_language_and_back():
    model = PLAIN.model()
    model.set_language("quy")
    with model.set_language("ace"):
        close(logits(model), PLAIN.expected(model, "ace"))
        close(logits(model, language="bxr"), PLAIN.expected(model, "bxr"))
        close(logits(model), PLAIN.expected(model, "ace"))
        with pytest.raises(ConfigError, match="'zzz' is not among"):
            model.set_language("zzz")
        assert model.language == "ace"
    assert model.language == "quy"
    close(logits(model), PLAIN.expected(model, "quy"))
    with pytest.raises(RuntimeError, match="inside"), model.set_language("ace"):
        raise RuntimeError("inside")
    assert model.language == "quy"
    model.set_language(["ace", "quy", "eng"])
    assert model.language == ("ace", "quy", "eng")
    found = logits(model)
    close(found, torch.stack([PLAIN.expected(model, code)[i] for i, code in enumerate(model.language)]))


def test_a_failing_forward_leaves_no_language_behind():
    model = PLAIN.model(language="eng")
    with pytest.raises(ConfigError, match="'zzz' is not among"):
        logits(model, language="zzz")
    close(logits(model), PLAIN.expected(model, "eng"))
    with pytest.raises(ConfigError, match=r"one language per example \(3\), got 2: \('quy', 'ace'\)"):
        logits(model, language=["quy", "ace"])
    with pytest.raises(ConfigError, match="must be a code or a list with one code per example, got 7"):
        logits(model, language=7)
    close(logits(model), PLAIN.expected(model, "eng"))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", [PLAIN, LAYERS], ids=["MAD-G", "MAD-G-LS"])
def test_layers_computed_again_use_the_language_of_their_forward(case, reentrant):
    def run(model, language):
        loss = model(input_ids=IDS, labels=IDS, language=language).loss
        with model.set_language("eng"):
            loss.backward()

    expected, model = case.model().train(), case.model(language="bxr").train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for language in ("quy", ["ace", "quy", "mlt"], "ace"):
        run(expected, language)
        run(model, language)
    for (name, found), (_, wanted) in zip(generator_parameters(model), generator_parameters(expected), strict=True):
        assert wanted.grad.abs().sum() > 0, name
        close(found.grad, wanted.grad)


def test_checkpointing_over_several_languages_is_refused():
    model = PLAIN.model().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    first = model(input_ids=IDS, labels=IDS, language="quy").loss
    second = model(input_ids=IDS, labels=IDS, language="ace").loss
    with pytest.raises(ConfigError, match="several forwards with different languages came before"):
        (first + second).backward()
    # Several of one language are right.
    model = PLAIN.model().train()
    sum(model(input_ids=IDS, labels=IDS, language="quy").loss for _ in range(2)).backward()
    twin = PLAIN.model().train()
    twin.enable_input_require_grads()
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    sum(twin(input_ids=IDS, labels=IDS, language="quy").loss for _ in range(2)).backward()
    for (_, found), (_, wanted) in zip(generator_parameters(twin), generator_parameters(model), strict=True):
        close(found.grad, wanted.grad)


# ---- vectors and files -----------------------------------------------------------------------------


def test_vectors_of_the_languages_used_are_saved_and_no_others(tmp_path):
    model = LAYERS.model()
    for language in ("quy", "mlt"):
        model.set_language(language)
    expected = {code: LAYERS.expected(model, code) for code in ("quy", "mlt", "bxr")}
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(saved["saved_typology"]["vectors"]) == ["mlt", "quy"]
    assert saved["saved_typology"]["feature_names"] == [str(i) for i in range(NUM_FEATURES)]
    assert saved["saved_typology"]["digest"] == Typology.from_vectors(VECTORS).digest
    assert saved["typology"] is None
    card = (tmp_path / "README.md").read_text()
    assert 'model.set_language("mlt")' in card
    assert "7 features of own vectors" in card
    loaded = PeftModel.from_pretrained(LAYERS.base(), tmp_path, autocast_adapter_dtype=False).eval()
    for language in ("quy", "mlt"):
        close(logits(loaded, language=language), expected[language])
    with pytest.raises(ConfigError, match=r"'bxr' is not saved with the adapter, which has \['mlt', 'quy'\]"):
        logits(loaded, language="bxr")
    loaded.set_typology(VECTORS)
    close(logits(loaded, language="bxr"), expected["bxr"])


@pytest.mark.parametrize(
    ("typology", "message"),
    [
        ({code: vector[:5] for code, vector in VECTORS.items()}, "features must be those of own vectors"),
        (Typology.from_vectors(VECTORS, feature_names=[f"S_{i}" for i in range(NUM_FEATURES)]), "'S_0' in place 0"),
        ({**VECTORS, "quy": 1 - VECTORS["quy"]}, r"vectors of \['quy'\]"),
    ],
    ids=["fewer features", "other names", "other values"],
)
def test_other_features_are_refused(tmp_path, typology, message):
    model = PLAIN.model(language="quy")
    logits(model)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    config = MadGConfig.from_pretrained(tmp_path)
    config.typology = Typology.from_vectors(typology) if isinstance(typology, dict) else typology
    base = PLAIN.base()
    with pytest.raises(ConfigError, match=message):
        PeftModel.from_pretrained(base, tmp_path, config=config)
    assert [name for name, _ in base.named_modules()] == [name for name, _ in PLAIN.base().named_modules()]
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False).eval()
    with pytest.raises(ConfigError, match=message):
        loaded.set_typology(typology)
    close(logits(loaded), expected)


def test_weights_of_other_features_are_refused(tmp_path):
    """Also where somebody brings a config of their own, which says nothing of what the weights were trained on."""
    PLAIN.model().save_pretrained(tmp_path)
    for other in (
        Typology.from_vectors(VECTORS, feature_names=[f"S_{i}" for i in range(NUM_FEATURES)]),
        {code: vector[:5] for code, vector in VECTORS.items()},
    ):
        base = PLAIN.base()
        with pytest.raises(FormatError, match=r"trained on other typological features|of shape"):
            PeftModel.from_pretrained(base, tmp_path, config=PLAIN.config(typology=other))
        assert [name for name, _ in base.named_modules()] == [name for name, _ in PLAIN.base().named_modules()]


def test_damaged_vectors_are_refused(tmp_path):
    model = PLAIN.model(language="quy")
    logits(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    saved["saved_typology"]["vectors"]["quy"] = "no digits"
    file.write_text(json.dumps(saved))
    base = PLAIN.base()
    with pytest.raises(FormatError, match="hexadecimal"):
        PeftModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == [name for name, _ in PLAIN.base().named_modules()]


# ---- what is generated -----------------------------------------------------------------------------


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


def test_generated_adapters_stack_below_a_task():
    network = PLAIN.model()
    model = get_peft_model(PLAIN.base(), Case("pfeiffer on post-norm").config(), adapter_name="task").eval()
    before = logits(model)
    for language in ("quy", "ace"):
        assert network.generate_adapter(language, adapter_name=f"{language} generated").add_to(model) is model
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
    tuned = get_peft_model(wider, BottleneckConfig(bottleneck_size=2), adapter_name="task")
    with pytest.raises(ConfigError, match="must be"):
        network.generate_adapter("quy").add_to(tuned)
    assert list(tuned.peft_config) == ["task"]


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


def test_building_in_needs_one_language():
    model = PLAIN.model()
    for language, message in ((None, "no language is set"), (["quy", "ace", "eng"], "one language must be set")):
        if language is not None:
            model.set_language(language)
        with pytest.raises(ConfigError, match=message):
            model.merge_and_unload()
    model.set_language("quy")
    close(logits(model), PLAIN.expected(model, "quy"))


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


def test_bfloat16_and_autocast():
    model = get_peft_model(PLAIN.base().bfloat16(), PLAIN.config(language="quy")).eval()
    assert {p.dtype for _, p in generator_parameters(model)} == {torch.float32}
    fill_generators(model, "default", 0)
    exact = PLAIN.model(language="quy")
    torch.testing.assert_close(logits(model).double(), logits(exact), rtol=0.1, atol=0.3)
    model = get_peft_model(PLAIN.base().float(), PLAIN.config(language="quy")).eval()
    fill_generators(model, "default", 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(logits(model).double(), logits(exact), rtol=0.1, atol=0.3)


def test_a_copy_has_a_language_of_its_own():
    model = LAYERS.model(language="quy")
    expected = {code: LAYERS.expected(model, code) for code in ("quy", "ace")}
    twin = copy.deepcopy(model)
    fill_generators(model, "default", 7)
    twin.set_language("ace")
    assert model.language == "quy"
    close(logits(twin), expected["ace"])
    close(logits(twin, language="quy"), expected["quy"])
    close(logits(model), LAYERS.expected(model, "quy"))

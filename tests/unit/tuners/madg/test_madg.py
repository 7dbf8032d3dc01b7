"""MAD-G: the request, its size and start, the language of a forward, and what is generated."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BertConfig, BertModel

from peft_sparse import (
    ConfigError,
    FormatError,
    MadGConfig,
    Typology,
)
from peft_sparse.tuners.madg.model import iter_sites
from tests.support.exact import IDS, close, logits
from tests.support.madg import NUM_FEATURES, VECTORS, MadGCase, fill_generators, generator_parameters

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
    assert "7 features of own vectors, under" in card
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


def test_a_file_of_vectors_need_not_come_along(tmp_path):
    file = tmp_path / "vectors.csv"
    names = [f"S_{i}" for i in range(NUM_FEATURES)]
    lines = [",".join([code, *(str(float(x)) for x in vector)]) for code, vector in VECTORS.items()]
    file.write_text("\n".join([",".join(["code", *names]), *lines]))
    model = PLAIN.model(typology=str(file), language="quy")
    close(logits(model), PLAIN.expected(model, "quy"))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    moved = file.rename(tmp_path / "moved.csv")
    loaded = PeftModel.from_pretrained(PLAIN.base(), tmp_path / "adapter", autocast_adapter_dtype=False).eval()
    close(logits(loaded), expected)
    loaded.set_typology(moved)
    close(logits(loaded, language="ace"), PLAIN.expected(model, "ace"))


def test_a_refused_typology_is_given_to_no_adapter():
    model = PLAIN.model("one")
    model.add_adapter("two", PLAIN.config(typology={**VECTORS, "quy": 1 - VECTORS["quy"]}))
    model.set_language("quy")
    model.set_adapter("two")
    model.set_language("quy")
    more = {**VECTORS, "new": torch.ones(NUM_FEATURES)}
    with pytest.raises(ConfigError, match=r"vectors of \['quy'\]"):
        model.set_typology(more)
    model.set_adapter("one")
    with pytest.raises(ConfigError, match="'new' is not among"):
        model.set_language("new")
    with pytest.raises(ConfigError, match="no MAD_G adapter 'three'"):
        model.set_typology(more, adapter_name="three")
    model.set_typology(more, adapter_name="one")
    model.set_language("new")


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


# ---- numbers and copies -----------------------------------------------------------------------------


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

"""An adapter for a language without one, mixed from those of others."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertModel

from peft_sparse import ConfigError, RandConfig, Typology, add_language_adapter, iter_deltas

TYPOLOGY = Typology.from_vectors({"eng": [1, 0, 1, 1], "ind": [0, 1, 1, 1], "min": [0, 1, 1, 0], "ace": [0, 1, 1, 0]})
ADAPTERS = {"en": "english", "ind": "indonesian", "min": "minang"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = BertModel(BertConfig(vocab_size=20, **sizes))
    config = {"num_weights": 60, "init_weights": False, "target_modules": "all-linear"}
    model = get_peft_model(base, RandConfig(**config, seed=0), adapter_name="english")
    model.add_adapter("indonesian", RandConfig(**config, seed=1))
    model.add_adapter("minang", RandConfig(**config, seed=2))
    return model


def dense(model, adapter: str) -> dict[str, torch.Tensor]:
    return {name: delta.delta.to_dense(dtype=torch.float64) for name, _, _, delta in iter_deltas(model, adapter)}


def test_the_mean_of_all(model):
    weights = add_language_adapter(model, "ace", ADAPTERS, adapter_name="mixed", typology=TYPOLOGY, temperature=0.2)
    assert weights == TYPOLOGY.mixing_weights("ace", ADAPTERS, temperature=0.2)
    assert list(weights) == ["min", "ind", "en"]
    parts = {source: dense(model, adapter) for source, adapter in ADAPTERS.items()}
    mixed = dense(model, "mixed")
    assert mixed.keys() == parts["min"].keys()
    for name, found in mixed.items():
        expected = sum(weights[source] * part[name] for source, part in parts.items())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert model.active_adapters == ["english"]


def test_the_nearest_alone_is_its_adapter(model):
    assert add_language_adapter(model, "ace", ADAPTERS, typology=TYPOLOGY, n=1) == {"min": 1.0}
    found, expected = dense(model, "ace"), dense(model, "minang")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_vectors_come_from_the_package_by_default(model, monkeypatch):
    monkeypatch.setattr("peft_sparse.tuners.language_adapter.load_typology", lambda: TYPOLOGY)
    assert add_language_adapter(model, "ace", ADAPTERS, n=1) == {"min": 1.0}


def test_refusals_leave_the_model_alone(model):
    with pytest.raises(ConfigError, match=r"language 'eng' has an adapter of its own \('english'\)"):
        add_language_adapter(model, "eng", ADAPTERS, typology=TYPOLOGY)
    with pytest.raises(ConfigError, match="language 'quy' is not among the 4"):
        add_language_adapter(model, "quy", ADAPTERS, typology=TYPOLOGY)
    with pytest.raises(ConfigError, match="'minang' is taken"):
        add_language_adapter(model, "ace", ADAPTERS, adapter_name="minang", typology=TYPOLOGY)
    with pytest.raises(ConfigError, match="adapters must name adapters of this model"):
        add_language_adapter(model, "ace", {"ind": "none"}, typology=TYPOLOGY)
    assert sorted(model.peft_config) == ["english", "indonesian", "minang"]

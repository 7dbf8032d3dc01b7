"""Adapters that were trained under one head serve the encoder of a class with another head, for every tuner type."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForTokenClassification,
)

from peft_sparse import (
    AdaSftConfig,
    BottleneckConfig,
    ConfigError,
    FormatError,
    MadGConfig,
    RandConfig,
    merge_checkpoint,
)

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 40,
}  # fmt: skip
IDS = torch.arange(5, 19).reshape(2, 7)
HEAD = "cls.predictions.transform.dense"


def made(cls, *, seed: int = 0):
    """A model whose encoder is the same for every class."""
    torch.manual_seed(seed)
    config = RobertaConfig if "Roberta" in cls.__name__ else BertConfig
    model = cls(config(**SIZES))
    chance = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.base_model.named_parameters()):
        if "pooler" not in name:
            parameter.data.normal_(0, 0.1, generator=chance)
    return model.eval()


def states(model) -> torch.Tensor:
    """What the encoder gives."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        return inner.base_model(IDS).last_hidden_state


CONFIGS = {
    "sparse": lambda: RandConfig(density=0.2, init_weights=False, target_modules="all-linear"),
    "sparse biases": lambda: RandConfig(
        density=0.2, init_weights=False, target_modules="all-linear", target_biases=True, target_norms=True
    ),
    "ada": lambda: AdaSftConfig(init_weights=False),
    "bottleneck": lambda: BottleneckConfig(reduction_factor=4),
    "madg": lambda: MadGConfig(
        bottleneck_size=3, language_dim=4, typology={"quy": torch.tensor([1.0, 0.0, 1.0])}, language="quy"
    ),
}
OWN_HEAD = ("sparse", "sparse biases", "ada")


def saved(folder, cls, config) -> torch.Tensor:
    """An adapter of a class on disk; returns the states under it."""
    tuned = get_peft_model(made(cls), config).eval()
    chance = torch.Generator().manual_seed(2)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1, generator=chance)
    tuned.save_pretrained(folder)
    return states(tuned)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("trained", "loaded"),
    [
        (BertForMaskedLM, BertForTokenClassification),
        (BertForMaskedLM, BertForSequenceClassification),
        (BertForSequenceClassification, BertForMaskedLM),
        (RobertaForMaskedLM, RobertaForTokenClassification),
    ],
)
def test_the_encoder_gives_what_it_gave_under_the_other_head(kind, trained, loaded, tmp_path, caplog):
    expected = saved(tmp_path / "adapter", trained, CONFIGS[kind]())
    base = made(loaded)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    assert not torch.equal(states(base), expected)
    with caplog.at_level(logging.WARNING):
        tuned = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(states(tuned), expected, rtol=0, atol=0)
    assert ("has no such part" in caplog.text) == (kind in OWN_HEAD)
    # What is saved from there is an adapter of its own, which loads without a word of another head.
    caplog.clear()
    tuned.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(made(loaded), tmp_path / "again").eval()
    torch.testing.assert_close(states(again), expected, rtol=0, atol=0)
    assert "has no such part" not in caplog.text
    merged = again.merge_and_unload()
    torch.testing.assert_close(states(merged), expected)
    layers = ("encoder.layer", "embeddings")
    heads = [name for name in before if not any(part in name for part in layers)]
    assert heads
    for name in heads:
        assert torch.equal(merged.state_dict()[name], before[name])


def test_it_lies_beside_a_task_adapter_and_is_named(tmp_path, caplog):
    saved(tmp_path / "language", BertForMaskedLM, CONFIGS["sparse"]())
    base = made(BertForTokenClassification)
    tuned = get_peft_model(base, RandConfig(density=0.1, init_weights=False, modules_to_save=["classifier"]), "task")
    tuned.load_adapter(tmp_path / "language", "language")
    assert (
        f"adapter 'language' also tunes {HEAD}, of the head that it was trained with. "
        "BertForTokenClassification has no such part"
    ) in caplog.text
    assert f"{HEAD}.weight" not in tuned.peft_config["language"].counts
    tuned.base_model.set_adapter(["language", "task"])
    together = states(tuned)
    tuned.base_model.set_adapter(["task"])
    assert not torch.equal(states(tuned), together)


def test_the_whole_file_is_checked_all_the_same(tmp_path):
    saved(tmp_path / "adapter", BertForMaskedLM, CONFIGS["sparse"]())
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if HEAD in key and key.endswith("values"))
    tensors[key][0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    base = made(BertForTokenClassification)
    with pytest.raises(FormatError, match="does not fit the tensors, which have changed"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not hasattr(base, "peft_config")


def test_what_is_missing_from_the_encoder_is_refused(tmp_path):
    saved(tmp_path / "adapter", BertForMaskedLM, CONFIGS["sparse"]())
    smaller = BertForTokenClassification(BertConfig(**{**SIZES, "num_hidden_layers": 1}))
    with pytest.raises(
        ConfigError, match=r"the adapter tunes 'bert.encoder.layer.1.*', which this model does not have"
    ):
        PeftModel.from_pretrained(smaller, tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"the adapter tunes '.*', which this model does not have"):
        PeftModel.from_pretrained(made(RobertaForTokenClassification), tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["sparse", "ada"])
def test_transformers_own_loader_takes_it_too(kind, tmp_path):
    expected = saved(tmp_path / "adapter", BertForMaskedLM, CONFIGS[kind]())
    model = made(BertForTokenClassification)
    model.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(states(model.eval()), expected, rtol=0, atol=0)


def test_on_disk_it_is_merged_below_a_task_with_a_head(tmp_path, caplog):
    saved(tmp_path / "language", BertForMaskedLM, CONFIGS["sparse"]())
    config = RandConfig(density=0.1, init_weights=False, modules_to_save=["classifier"])
    get_peft_model(made(BertForTokenClassification), config).save_pretrained(tmp_path / "task")
    made(BertForMaskedLM).save_pretrained(tmp_path / "base")
    merge_checkpoint(tmp_path / "base", [tmp_path / "language", tmp_path / "task"], tmp_path / "merged")
    assert "has no such parts of a head; they are left out" in caplog.text
    assert f"{HEAD}.weight" in caplog.text
    model = PeftModel.from_pretrained(made(BertForTokenClassification), tmp_path / "language", adapter_name="language")
    model.load_adapter(tmp_path / "task", "task")
    model.base_model.set_adapter(["language", "task"])
    merged = BertForTokenClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model.eval()(IDS).logits)
    # Under the class that it was trained on nothing is left out.
    caplog.clear()
    merge_checkpoint(tmp_path / "base", [tmp_path / "language"], tmp_path / "whole")
    assert "left out" not in caplog.text
    whole = BertForMaskedLM.from_pretrained(tmp_path / "whole")
    assert not torch.equal(whole.get_parameter(f"{HEAD}.weight"), made(BertForMaskedLM).get_parameter(f"{HEAD}.weight"))
    made(RobertaForTokenClassification).save_pretrained(tmp_path / "other")
    with pytest.raises(FormatError, match=r"the adapters do not fit .*other\. Nothing was written"):
        merge_checkpoint(tmp_path / "other", [tmp_path / "language"], tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_masked_adapter_leaves_the_new_head_alone(tmp_path, caplog):
    saved(tmp_path / "adapter", BertForMaskedLM, CONFIGS["ada"]())
    PeftModel.from_pretrained(made(BertForTokenClassification), tmp_path / "adapter")
    assert "holds nothing for classifier" in caplog.text
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {key: tensor for key, tensor in load_file(path).items() if "layer.1.attention.self.query" not in key}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"'bert.encoder.layer.1.attention.self.query.* is missing"):
        PeftModel.from_pretrained(made(BertForTokenClassification), tmp_path / "adapter")

"""Sparse adapters out of LoRA, SHiRA and Super-Tuning adapters, compared with what PEFT itself merges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    ShiraConfig,
    SupertuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from peft_sparse import extract_adapter
from peft_sparse.errors import FormatError
from tests.support.checkpoints import output, save, saved_deltas, tiny_bert, tiny_llama

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save(tiny_llama(), folder)
    return folder


def train(base: Path, folder: Path, config, kind=LlamaForCausalLM, **options):
    """An adapter with weights that are not zero, on disk and in its model; its heads are moved."""
    torch.manual_seed(3)
    model = get_peft_model(kind.from_pretrained(base, **options), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def dense_differences(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT's own merge changes, in float64: the model is cast before it is merged."""
    plain = LlamaForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).double().merge_and_unload()
    merged = dict(model.named_parameters())
    found = {name: merged[name].detach() - p.detach().double() for name, p in plain.named_parameters()}
    return {name: difference for name, difference in found.items() if bool(difference.any())}


LORAS = {
    "plain": LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    "rslora": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, use_rslora=True),
    "patterns": LoraConfig(
        r=2,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"layers.1.mlp.up_proj": 5},
        alpha_pattern={"layers.0.self_attn.q_proj": 3},
        init_lora_weights=False,
    ),
    "embedding": LoraConfig(r=2, target_modules=["embed_tokens", "v_proj"], init_lora_weights=False),
}
SPARSE = {
    "shira": ShiraConfig(r=1, target_modules=["q_proj", "v_proj"], init_weights=False),
    "super": SupertuningConfig(target_modules=["q_proj"], sparsity=0.8, init_weights=False),
}


@pytest.mark.parametrize("config", [*LORAS.values(), *SPARSE.values()], ids=[*LORAS, *SPARSE])
def test_all_of_an_adapter(base, tmp_path, config):
    expected_output = output(train(base, tmp_path / "other", config))
    expected = dense_differences(base, tmp_path / "other")
    result = extract_adapter(base, tmp_path / "other", tmp_path / "sparse", num_weights="changed")
    deltas = saved_deltas(tmp_path / "sparse" / ADAPTER)
    assert deltas.keys() == expected.keys()
    for name, delta in deltas.items():
        found = delta.to_dense().double()
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-7)
        assert delta.count == int((expected[name] != 0).sum())
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "sparse")
    torch.testing.assert_close(output(model), expected_output, rtol=1e-4, atol=1e-5)
    assert result.total.share_kept == pytest.approx(1.0)


def test_a_sparse_adapter_comes_over_value_by_value(base, tmp_path):
    model = train(base, tmp_path / "other", SPARSE["super"])
    extract_adapter(base, tmp_path / "other", tmp_path / "sparse", num_weights="changed")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    order = layer.supertuning_indices["default"].argsort()
    delta = saved_deltas(tmp_path / "sparse" / ADAPTER)["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(delta.indices, layer.supertuning_indices["default"][order])
    assert torch.equal(delta.values, layer.supertuning_values["default"].detach()[order])


def test_the_largest_entries_of_a_lora(base, tmp_path):
    train(base, tmp_path / "other", LORAS["plain"])
    expected = dense_differences(base, tmp_path / "other")
    result = extract_adapter(base, tmp_path / "other", tmp_path / "sparse", density=0.2)
    every = torch.cat([difference.abs().flatten() for difference in expected.values()])
    best = every.sort(descending=True).values[: result.total.count]
    assert result.total.count == round(0.2 * every.numel())
    share = float(best.square().sum() / every.square().sum())
    assert result.total.share_kept == pytest.approx(share, rel=1e-5)


def test_a_head_that_is_named_by_its_end_comes_along(tmp_path):
    """DistilBERT's "pre_classifier", which PEFT trains whole where "classifier" is named."""
    torch.manual_seed(0)
    fields = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "vocab_size": 30, "max_position_embeddings": 20}
    save(DistilBertForSequenceClassification(DistilBertConfig(**fields, num_labels=3)), tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_lin"], init_lora_weights=False, task_type="SEQ_CLS")
    lora = train(tmp_path / "base", tmp_path / "lora", config, DistilBertForSequenceClassification)
    extract_adapter(tmp_path / "base", tmp_path / "lora", tmp_path / "sparse", num_weights="changed")
    plain = DistilBertForSequenceClassification.from_pretrained(tmp_path / "base")
    found = PeftModel.from_pretrained(plain, tmp_path / "sparse").merge_and_unload()
    wanted = lora.merge_and_unload()
    for name in ("pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"):
        assert torch.equal(found.get_parameter(name), wanted.get_parameter(name))


def test_heads_come_along(base, tmp_path):
    save(tiny_bert(), tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, task_type="SEQ_CLS")
    kind = BertForSequenceClassification
    expected = output(train(tmp_path / "base", tmp_path / "other", config, kind, num_labels=3))
    result = extract_adapter(tmp_path / "base", tmp_path / "other", tmp_path / "sparse", num_weights="changed")
    assert result.heads == ("classifier",)
    model = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base", num_labels=3), tmp_path / "sparse")
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    assert model.peft_config["default"].task_type == "SEQ_CLS"


def test_heads_that_peft_finds_inside_of_a_name_come_along(tmp_path):
    """PEFT trains `pre_classifier` with `classifier`."""
    torch.manual_seed(0)
    sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "vocab_size": 30}
    kind = DistilBertForSequenceClassification
    save(kind(DistilBertConfig(**sizes)), tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_lin"], init_lora_weights=False, task_type="SEQ_CLS")
    trained = train(tmp_path / "base", tmp_path / "other", config, kind)
    extract_adapter(tmp_path / "base", tmp_path / "other", tmp_path / "sparse", num_weights="changed")
    model = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "sparse").eval()
    torch.testing.assert_close(output(model), output(trained), rtol=1e-4, atol=1e-5)
    whole = model.merge_and_unload()
    assert torch.equal(whole.pre_classifier.weight, trained.merge_and_unload().pre_classifier.weight)


def test_transposed_weights(tmp_path):
    torch.manual_seed(0)
    save(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30)), tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    expected = output(train(tmp_path / "base", tmp_path / "other", config, GPT2LMHeadModel))
    extract_adapter(tmp_path / "base", tmp_path / "other", tmp_path / "sparse", num_weights="changed")
    model = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "sparse")
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)


def test_the_weights_of_the_base_are_not_read(base, tmp_path):
    train(base, tmp_path / "other", LORAS["plain"])
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes((base / "config.json").read_bytes())
    result = extract_adapter(tmp_path / "base", tmp_path / "other", tmp_path / "sparse", density=0.1)
    assert result.total.count == round(0.1 * result.total.size)


REFUSED = {
    "use_dora=True": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "bias='all'": LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
    "init_lora_weights='pissa'": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
    "save_precomputed_indices=False": SupertuningConfig(
        target_modules=["q_proj"], sparsity=0.8, save_precomputed_indices=False
    ),
    "of type IA3": IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_more_than_a_difference_is_refused(base, tmp_path, reason):
    train(base, tmp_path / "other", REFUSED[reason])
    with pytest.raises(FormatError, match=rf"{reason}.*merge_and_unload\(\).save_pretrained"):
        extract_adapter(base, tmp_path / "other", tmp_path / "sparse", density=0.1)
    assert not (tmp_path / "sparse").exists()


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    save(tiny_llama(intermediate_size=32), tmp_path / "wide")
    train(tmp_path / "wide", tmp_path / "other", LORAS["plain"])
    with pytest.raises(FormatError, match=r"other does not fit (.|\n)*size mismatch for .*mlp.gate_proj.lora_B"):
        extract_adapter(base, tmp_path / "other", tmp_path / "sparse", density=0.1)


def test_a_missing_tensor_is_refused(base, tmp_path):
    train(base, tmp_path / "other", LORAS["plain"])
    tensors = load_file(tmp_path / "other" / ADAPTER)
    gone = next(key for key in tensors if "up_proj.lora_B" in key)
    save_file({key: tensor for key, tensor in tensors.items() if key != gone}, tmp_path / "other" / ADAPTER)
    with pytest.raises(FormatError, match=r"does not fit(.|\n)*up_proj.lora_B.*missing"):
        extract_adapter(base, tmp_path / "other", tmp_path / "sparse", density=0.1)


def test_a_damaged_config_is_refused(base, tmp_path):
    train(base, tmp_path / "other", LORAS["plain"])
    (tmp_path / "other" / "adapter_config.json").write_text("{")
    with pytest.raises(FormatError, match=r"adapter_config.json is not valid JSON"):
        extract_adapter(base, tmp_path / "other", tmp_path / "sparse", density=0.1)


def test_a_pickled_adapter_is_refused(base, tmp_path):
    train(base, tmp_path / "other", LORAS["plain"])
    (tmp_path / "other" / ADAPTER).rename(tmp_path / "other" / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"adapter_model\.bin, a pickle, which is never opened"):
        extract_adapter(base, tmp_path / "other", tmp_path / "sparse", density=0.1)


def test_embeddings_of_the_base_in_the_file_are_left_out(base, tmp_path, caplog):
    model = train(base, tmp_path / "other", LORAS["embedding"])
    model.save_pretrained(tmp_path / "other", save_embedding_layers=True)
    assert any("embed_tokens.base_layer" in key for key in load_file(tmp_path / "other" / ADAPTER))
    extract_adapter(base, tmp_path / "other", tmp_path / "sparse", num_weights="changed")
    assert "belongs to the base model and was left out" in caplog.text
    expected = dense_differences(base, tmp_path / "other")
    assert saved_deltas(tmp_path / "sparse" / ADAPTER).keys() == expected.keys()
    settings = json.loads((tmp_path / "sparse" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] is None

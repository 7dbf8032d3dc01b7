"""Merging into a checkpoint on disk: the tensors that `merge_and_unload` gives, bit for bit, without the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from peft_sparse import RandConfig, merge_checkpoint
from peft_sparse.checkpoints import native
from peft_sparse.checkpoints.shards import WEIGHTS, Checkpoint
from peft_sparse.errors import ConfigError, FormatError
from tests.support.merging import (
    MODELS,
    assert_same,
    load,
    one_weight,
    save_adapter,
    save_base,
    write_adapter,
)
from tests.support.models import SMALL, bert, llama

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_merged_files_are_those_of_the_merged_model(kind, dtype, tmp_path):
    torch.manual_seed(0)
    model = MODELS[kind]()
    base = save_base(tmp_path, model, dtype)
    adapter = save_adapter(tmp_path, model)
    merged = merge_checkpoint(base, [adapter], tmp_path / "out")
    expected = load(type(model), base, adapter).merge_and_unload()
    assert_same(tmp_path / "out", expected, tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert merged.num_weights == sum(config["counts"].values())
    reloaded = type(model).from_pretrained(tmp_path / "out")
    wanted = dict(expected.named_parameters(remove_duplicate=False))
    for name, parameter in reloaded.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, wanted[name]), name
    assert not torch.equal(
        reloaded.get_input_embeddings().weight, type(model).from_pretrained(base).get_input_embeddings().weight
    )


def test_shards_in_and_shards_out(tmp_path):
    model = llama()
    base = save_base(tmp_path, model, max_shard_size="5KB")
    adapter = save_adapter(tmp_path, model)
    merge_checkpoint(base, [adapter], tmp_path / "out", max_shard_bytes=3000)
    assert len(Checkpoint(tmp_path / "out").shards) > len(Checkpoint(base).shards) > 1
    assert_same(tmp_path / "out", load(LlamaForCausalLM, base, adapter).merge_and_unload(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values_dtype", ["float32", "bfloat16"])
def test_weighted_adapters_are_those_of_add_weighted_adapter(dtype, values_dtype, tmp_path):
    model = llama(tie_word_embeddings=True)
    base = save_base(tmp_path, model, dtype)
    one = save_adapter(tmp_path, llama(), "one", seed=1, target_modules=["q_proj", "embed_tokens"],
                       values_dtype=values_dtype)  # fmt: skip
    two = save_adapter(tmp_path, llama(), "two", seed=2, target_modules=["q_proj", "up_proj"])
    merge_checkpoint(base, [one, two], tmp_path / "out", weights=[0.7, -1.3])
    loaded = load(LlamaForCausalLM, base, one, two)
    loaded.add_weighted_adapter(["0", "1"], [0.7, -1.3], "both", combination_type="linear")
    loaded.set_adapter("both")
    assert_same(tmp_path / "out", loaded.merge_and_unload(), tmp_path)


def test_adapters_without_weights_are_merged_together(tmp_path):
    model = llama()
    base = save_base(tmp_path, model, torch.bfloat16)
    adapters = [save_adapter(tmp_path, llama(), str(seed), seed=seed) for seed in (1, 2, 3)]
    merge_checkpoint(base, adapters, tmp_path / "out")
    loaded = load(LlamaForCausalLM, base, *adapters)
    assert_same(tmp_path / "out", loaded.merge_and_unload(adapter_names=["0", "1", "2"]), tmp_path)


def test_another_dtype_is_rounded_to_once(tmp_path):
    model = llama()
    base = save_base(tmp_path, model)
    adapter = save_adapter(tmp_path, model, target_modules=["q_proj"])
    merge_checkpoint(base, [adapter], tmp_path / "out", dtype=torch.bfloat16)
    found = Checkpoint(tmp_path / "out")
    expected = load(LlamaForCausalLM, base, adapter).merge_and_unload().to(torch.bfloat16)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.tensor(name), tensor), name
    assert found.config["dtype"] == "bfloat16"
    narrow = save_base(tmp_path / "narrow", llama(), torch.bfloat16)
    merge_checkpoint(narrow, [adapter], tmp_path / "wide", dtype=torch.float32)
    name = "model.layers.0.self_attn.q_proj.weight"
    delta = native.verify(load_file(adapter / native.SOURCE))[name]
    exact = Checkpoint(narrow).tensor(name).float() + delta.to_dense()
    assert torch.equal(Checkpoint(tmp_path / "wide").tensor(name), exact)
    assert not torch.equal(exact.bfloat16().float(), exact)


# What a checkpoint calls its tensors, and what the adapter's model calls them


@pytest.mark.parametrize("base_class", [BertForMaskedLM, BertModel, BertForSequenceClassification])
@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_a_classifier_on_the_checkpoint_of_another_class(base_class, task, tmp_path, caplog):
    torch.manual_seed(0)
    base = save_base(tmp_path, bert(base_class))
    classifier = BertForSequenceClassification.from_pretrained(base, num_labels=3, ignore_mismatched_sizes=True)
    heads = None if task else ["classifier"]
    model = get_peft_model(
        classifier,
        RandConfig(
            density=0.3,
            init_weights=False,
            target_modules="all",
            exclude_modules=["pooler.dense"],  # which a checkpoint for masked language modelling has not
            task_type=task,
            modules_to_save=heads,
        ),
    )
    nn.init.normal_(classifier.classifier.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    merged = merge_checkpoint(base, [tmp_path / "adapter"], tmp_path / "out")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    expected = model.eval().merge_and_unload()
    assert reloaded.config.num_labels == 3
    missing = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} if base_class is BertForMaskedLM else set()
    assert ("neither in the checkpoint nor in the adapters" in caplog.text) == bool(missing)
    for name, tensor in expected.state_dict().items():
        if name in missing:
            continue
        assert torch.equal(reloaded.state_dict()[name], tensor), name
    has_own = base_class is BertForSequenceClassification
    assert merged.added == ([] if has_own else ["classifier.bias", "classifier.weight"])
    assert Checkpoint(tmp_path / "out").config["architectures"] == ["BertForSequenceClassification"]


def test_a_language_adapter_of_a_masked_lm_fits_the_checkpoint_of_the_bare_model(tmp_path):
    base = save_base(tmp_path, bert(BertModel))
    adapter = save_adapter(tmp_path, BertForMaskedLM.from_pretrained(base))
    merge_checkpoint(base, [adapter], tmp_path / "out")
    expected = load(BertForMaskedLM, base, adapter).merge_and_unload().bert
    found = Checkpoint(tmp_path / "out")
    assert set(found.names()) == set(Checkpoint(base).names())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.tensor(name), tensor), name


def test_names_of_older_versions(tmp_path):
    model = bert()
    base = save_base(tmp_path, model)
    adapter = save_adapter(tmp_path, model)
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(base / WEIGHTS).items()
    }
    assert sum("gamma" in name for name in older) == 6
    save_file(older, base / WEIGHTS, metadata={"format": "pt"})
    merge_checkpoint(base, [adapter], tmp_path / "out")
    assert set(older) <= set(Checkpoint(tmp_path / "out").names())
    expected = load(BertForMaskedLM, base, adapter).merge_and_unload()
    reloaded = BertForMaskedLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(reloaded[name], tensor) for name, tensor in expected.state_dict().items())


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
    return save_base(tmp_path_factory.mktemp("experts"), MixtralForCausalLM(config))


def test_tensors_that_loading_joins_are_left_alone(experts, tmp_path):
    adapter = save_adapter(tmp_path, MixtralForCausalLM.from_pretrained(experts), target_modules=["q_proj", "v_proj"])
    merge_checkpoint(experts, [adapter], tmp_path / "out")
    assert any(".experts.1.w1." in name for name in Checkpoint(tmp_path / "out").names())
    expected = load(MixtralForCausalLM, experts, adapter).merge_and_unload().state_dict()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(reloaded[name], tensor) for name, tensor in expected.items())


def test_a_delta_on_a_tensor_in_pieces_is_refused(experts, tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    shape = MixtralForCausalLM.from_pretrained(experts).get_parameter(name).shape
    # Native names end in weight or bias: the name of an expert's tensor gets there through a module of that name.
    adapter = write_adapter(tmp_path / "a", {"model.layers.0.mlp.experts.gate_up_proj.weight": one_weight(*shape)})
    with pytest.raises(FormatError, match="MixtralForCausalLM has no parameters of these names"):
        merge_checkpoint(experts, [adapter], tmp_path / "out")


# Heads


def token_classifier(folder: Path, base: Path, name: str, seed: int) -> Path:
    torch.manual_seed(seed)
    model = BertForTokenClassification.from_pretrained(base, num_labels=4)
    config = RandConfig(density=0.3, init_weights=False, task_type="TOKEN_CLS", target_modules=["query"])
    get_peft_model(model, config).save_pretrained(folder / name)
    return folder / name


def test_a_language_and_a_task(tmp_path):
    base = save_base(tmp_path, bert())
    language = save_adapter(tmp_path, BertForMaskedLM.from_pretrained(base), "language")
    task = token_classifier(tmp_path, base, "task", 3)
    merge_checkpoint(base, [language, task], tmp_path / "out", weights=[1.0, 1.0])
    model = BertForTokenClassification.from_pretrained(base, num_labels=4)
    model = PeftModel.from_pretrained(model, language, adapter_name="0")
    model.load_adapter(task, adapter_name="1")
    model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "both", combination_type="linear")
    model.set_adapter("both")
    expected = model.merge_and_unload().state_dict()
    reloaded = AutoModelForTokenClassification.from_pretrained(tmp_path / "out").state_dict()
    assert expected.keys() == reloaded.keys()
    assert all(torch.equal(reloaded[name], tensor) for name, tensor in expected.items())


def test_one_head_of_several_must_be_named(tmp_path):
    base = save_base(tmp_path, bert())
    one, two = (token_classifier(tmp_path, base, f"task{seed}", seed) for seed in (1, 2))
    with pytest.raises(ConfigError, match=r"all have heads \(modules_to_save\): say whose to keep with head_from"):
        merge_checkpoint(base, [one, two], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"head_from must be one of the adapters that have heads .*, got 'three'"):
        merge_checkpoint(base, [one, two], tmp_path / "out", head_from="three")
    assert not (tmp_path / "out").exists()
    merge_checkpoint(base, [one, two], tmp_path / "out", head_from=two)
    head = load_file(two / native.SOURCE)["base_model.model.classifier.weight"]
    assert torch.equal(Checkpoint(tmp_path / "out").tensor("classifier.weight"), head)


def test_a_head_that_is_tied_unties(tmp_path):
    model = llama(tie_word_embeddings=True)
    base = save_base(tmp_path, model)
    adapter = save_adapter(tmp_path, model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    state = load_file(adapter / native.SOURCE)
    state["base_model.model.lm_head.weight"] += 1
    save_file(native.finish(state), adapter / native.SOURCE)
    merge_checkpoint(base, [adapter], tmp_path / "out")
    assert_same(tmp_path / "out", load(LlamaForCausalLM, base, adapter).merge_and_unload(), tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(reloaded.lm_head.weight, reloaded.model.embed_tokens.weight + 1)


def test_an_adapter_that_is_named_twice_is_added_once_unless_each_has_a_factor(tmp_path):
    base = save_base(tmp_path, llama())
    adapter = save_adapter(tmp_path, llama())
    once = merge_checkpoint(base, [adapter], tmp_path / "once")
    again = f"{adapter}/../{adapter.name}/"
    twice = merge_checkpoint(base, [adapter, again], tmp_path / "twice")
    merge_checkpoint(base, [adapter, again], tmp_path / "halves", weights=[0.25, 0.75])
    for folder in ("twice", "halves"):
        for name in Checkpoint(tmp_path / "once").names():
            assert torch.equal(
                Checkpoint(tmp_path / folder).tensor(name), Checkpoint(tmp_path / "once").tensor(name)
            ), name
    assert twice.num_weights == once.num_weights


def test_an_adapter_beside_the_base_checkpoint_is_not_copied(tmp_path):
    base = save_base(tmp_path, llama())
    save_adapter(tmp_path, llama(), "base", seed=1)
    adapter = save_adapter(tmp_path, llama())
    merge_checkpoint(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = load(LlamaForCausalLM, tmp_path / "out").state_dict()
    assert not hasattr(merged, "peft_config")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())


def test_a_dtype_may_be_named(tmp_path):
    base, adapter = save_base(tmp_path, llama()), save_adapter(tmp_path, llama())
    merge_checkpoint(base, [adapter], tmp_path / "object", dtype=torch.bfloat16)
    merge_checkpoint(base, [adapter], tmp_path / "name", dtype="bfloat16")
    one, other = (load_file(tmp_path / folder / WEIGHTS) for folder in ("object", "name"))
    assert {tensor.dtype for tensor in other.values()} == {torch.bfloat16}
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())

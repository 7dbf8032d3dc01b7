"""Merging into a checkpoint on disk: the tensors that `merge_and_unload` gives, bit for bit, without the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_sparse import RandConfig, SparseDelta, merge_checkpoint
from peft_sparse.checkpoints import native
from peft_sparse.checkpoints.shards import WEIGHTS, Checkpoint
from peft_sparse.errors import ConfigError, FormatError

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30}
BERT = BertConfig(**SMALL, max_position_embeddings=12)


def llama(**fields) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **fields))


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=30, decoder_start_token_id=0)
    )


MODELS = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "bert": lambda: BertForMaskedLM(BERT),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=12)),
    "t5": t5,
}


def save_base(folder: Path, model: nn.Module, dtype: torch.dtype = torch.float32, **options) -> Path:
    model.to(dtype).save_pretrained(folder / "base", **options)
    return folder / "base"


def save_adapter(folder: Path, base: nn.Module, name: str = "adapter", *, seed: int = 0, **fields) -> Path:
    torch.manual_seed(seed)
    request = {"density": 0.3, "init_weights": False, "seed": seed, "target_modules": "all"}
    get_peft_model(base, RandConfig(**{**request, **fields})).save_pretrained(folder / name)
    return folder / name


def write_adapter(folder: Path, deltas: dict[str, SparseDelta], heads: dict | None = None, **config) -> Path:
    """An adapter that no model had to make."""
    folder.mkdir()
    save_file(native.build(deltas, heads), folder / native.SOURCE)
    counts = {name: delta.count for name, delta in deltas.items()}
    text = json.dumps({"peft_type": "SPARSE_FT", "method": "fixed", "num_weights": 1, "counts": counts, **config})
    (folder / "adapter_config.json").write_text(text)
    return folder


def one_weight(*shape: int) -> SparseDelta:
    return SparseDelta(torch.tensor([1], dtype=torch.int32), torch.tensor([0.5]), shape)


def load(model_class: type, base: Path, *adapters: Path, **options) -> PeftModel:
    model = model_class.from_pretrained(base, **options)
    for number, adapter in enumerate(adapters):
        if number == 0:
            model = PeftModel.from_pretrained(model, adapter, adapter_name="0")
        else:
            model.load_adapter(adapter, adapter_name=str(number))
    return model


def assert_same(folder: Path, merged: nn.Module, tmp_path: Path) -> None:
    """The files hold every tensor that saving the merged model gives, bit for bit."""
    merged.save_pretrained(tmp_path / "expected")
    found, expected = Checkpoint(folder), Checkpoint(tmp_path / "expected")
    assert set(expected.names()) <= set(found.names())
    for name in expected.names():
        assert found.dtype(name) == expected.dtype(name)
        assert torch.equal(found.tensor(name), expected.tensor(name)), name
    for key in ("tie_word_embeddings", "architectures", "dtype"):
        assert found.config.get(key) == expected.config.get(key)


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
    base = save_base(tmp_path, base_class(BertConfig(**SMALL, max_position_embeddings=12)))
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
    base = save_base(tmp_path, BertModel(BERT))
    adapter = save_adapter(tmp_path, BertForMaskedLM.from_pretrained(base))
    merge_checkpoint(base, [adapter], tmp_path / "out")
    expected = load(BertForMaskedLM, base, adapter).merge_and_unload().bert
    found = Checkpoint(tmp_path / "out")
    assert set(found.names()) == set(Checkpoint(base).names())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.tensor(name), tensor), name


def test_names_of_older_versions(tmp_path):
    model = BertForMaskedLM(BERT)
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
    base = save_base(tmp_path, BertForMaskedLM(BERT))
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
    base = save_base(tmp_path, BertForMaskedLM(BERT))
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


# Refusals: before anything is written


@pytest.fixture
def base(tmp_path) -> Path:
    return save_base(tmp_path, llama())


def refuse(base: Path, adapters: list, tmp_path: Path, error: type, match: str, **options) -> None:
    with pytest.raises(error, match=match):
        merge_checkpoint(base, adapters, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_every_tensor_that_does_not_fit_is_listed(base, tmp_path):
    deltas = {f"model.layers.{i}.mlp.up_proj.weight": one_weight(24, 17) for i in range(2)}
    match = (
        r"do not fit .*base\. Nothing was written\. These tensors do not match:\n"
        r"  model\.layers\.0\.mlp\.up_proj\.weight of .*: it has shape \(24, 17\) there, \(24, 16\) in the checkpoint\n"
        r"  model\.layers\.1\."
    )
    refuse(base, [write_adapter(tmp_path / "a", deltas)], tmp_path, FormatError, match)


def test_unknown_names_are_listed(base, tmp_path):
    deltas = {f"encoder.layer.{i}.query.weight": one_weight(4, 4) for i in range(12)}
    match = r"LlamaForCausalLM has no parameters of these names:\n  encoder\.layer\.0\.query\.weight(.|\n)*2 more"
    refuse(base, [write_adapter(tmp_path / "a", deltas)], tmp_path, FormatError, match)


def test_a_tensor_that_the_checkpoint_lacks(base, tmp_path):
    state = load_file(base / WEIGHTS)
    del state["model.norm.weight"]
    save_file(state, base / WEIGHTS, metadata={"format": "pt"})
    adapter = write_adapter(tmp_path / "a", {"model.norm.weight": one_weight(16)})
    refuse(base, [adapter], tmp_path, FormatError, "model.norm.weight of .*: the checkpoint has no tensor for it")


def test_a_tensor_that_the_checkpoint_has_twice(base, tmp_path):
    state = load_file(base / WEIGHTS)
    state["norm.weight"] = state["model.norm.weight"].clone()
    save_file(state, base / WEIGHTS, metadata={"format": "pt"})
    adapter = write_adapter(tmp_path / "a", {"model.norm.weight": one_weight(16)})
    refuse(base, [adapter], tmp_path, FormatError, r"more than once, as model\.norm\.weight, norm\.weight")


def test_a_tensor_of_integers(base, tmp_path):
    state = load_file(base / WEIGHTS)
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.int8)
    save_file(state, base / WEIGHTS, metadata={"format": "pt"})
    adapter = write_adapter(tmp_path / "a", {"model.norm.weight": one_weight(16)})
    refuse(base, [adapter], tmp_path, FormatError, r"it is quantised in the checkpoint, of dtype torch\.int8")


def test_a_quantised_checkpoint(base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    adapter = write_adapter(tmp_path / "a", {"model.norm.weight": one_weight(16)})
    refuse(base, [adapter], tmp_path, ConfigError, "is quantised, and a delta would be lost in rounding")


def test_a_head_of_another_size(tmp_path):
    base = save_base(tmp_path, BertModel(BERT))
    heads = {"classifier.weight": torch.zeros(3, 5), "classifier.bias": torch.zeros(3)}
    adapter = write_adapter(tmp_path / "a", {}, heads, modules_to_save=["classifier"], task_type="SEQ_CLS")
    match = r"head does not fit BertForSequenceClassification(.|\n)*classifier\.weight: of shape \(3, 5\) in the"
    refuse(base, [adapter], tmp_path, FormatError, match)


def test_embeddings_that_came_along(base, tmp_path):
    name = "model.embed_tokens.weight"
    own = load_file(base / WEIGHTS)[name]
    deltas = {"model.norm.weight": one_weight(16)}
    same = write_adapter(tmp_path / "same", deltas, {name: own})
    merge_checkpoint(base, [same], tmp_path / "fine")
    other = write_adapter(tmp_path / "other", deltas, {name: own + 1})
    match = r"model\.embed_tokens\.weight: .*other brings one of its own"
    refuse(base, [other], tmp_path, FormatError, match)


def test_rows_of_the_embedding(base, tmp_path):
    adapter = write_adapter(tmp_path / "a", {"model.norm.weight": one_weight(16)}, trainable_token_indices=[1])
    refuse(base, [adapter], tmp_path, ConfigError, r"trains rows of the embedding \(trainable_token_indices\)")


def test_another_type_of_adapter(base, tmp_path):
    get_peft_model(llama(), LoraConfig(r=1, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    refuse(base, [tmp_path / "lora"], tmp_path, FormatError, "is no sparse adapter: .* peft_type 'LORA'")


def test_a_damaged_adapter(base, tmp_path):
    adapter = write_adapter(tmp_path / "a", {"model.norm.weight": one_weight(16)})
    state = load_file(adapter / native.SOURCE)
    state["base_model.model.model.norm.sparse_ft_weight.values"] += 1
    save_file(state, adapter / native.SOURCE)
    refuse(base, [adapter], tmp_path, FormatError, "does not fit the tensors, which have changed")


def test_adapters_that_are_none(base, tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(base, [tmp_path / "empty"], tmp_path, ConfigError, "empty' has no adapter_config.json. Give the folder")
    refuse(base, ["./no/such/thing"], tmp_path, ConfigError, "There is no folder '.*no/such/thing', and it is no id")
    refuse(
        base, ["peft-sparse-tests/none"], tmp_path, ConfigError, "none', and adapter_config.json of that name cannot"
    )
    refuse(base, [], tmp_path, ConfigError, "at least one adapter is needed to merge, got none")


def test_weights_must_match_the_adapters(base, tmp_path):
    adapter = write_adapter(tmp_path / "a", {"model.norm.weight": one_weight(16)})
    match = "weights must hold one number per adapter, got 2 for 1 adapters"
    refuse(base, [adapter], tmp_path, ConfigError, match, weights=[1.0, 2.0])


def test_the_output_must_be_new_and_not_the_base(base, tmp_path):
    adapter = write_adapter(tmp_path / "a", {"model.norm.weight": one_weight(16)})
    with pytest.raises(ConfigError, match="is the base checkpoint itself"):
        merge_checkpoint(base, [adapter], base, overwrite=True)
    merge_checkpoint(base, [adapter], tmp_path / "out")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        merge_checkpoint(base, [adapter], tmp_path / "out")
    merge_checkpoint(base, [adapter], tmp_path / "out", weights=[2.0], overwrite=True)
    norm = Checkpoint(tmp_path / "out").tensor("model.norm.weight")
    assert norm.tolist() == [1.0, 2.0] + [1.0] * 14


def test_a_base_without_a_config(base, tmp_path):
    (base / "config.json").unlink()
    adapter = write_adapter(tmp_path / "a", {"model.norm.weight": one_weight(16)})
    refuse(base, [adapter], tmp_path, ConfigError, "has no config of a transformers model")


def test_a_base_of_an_unknown_class(base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForOracles"]}))
    adapter = write_adapter(tmp_path / "a", {"model.norm.weight": one_weight(16)})
    refuse(base, [adapter], tmp_path, ConfigError, r"the class of the model is not known: .*\['LlamaForOracles'\]")
    adapter = write_adapter(tmp_path / "b", {"model.norm.weight": one_weight(16)}, task_type="CAUSAL_LM")
    merge_checkpoint(base, [adapter], tmp_path / "fine")


NORM = {"model.norm.weight": one_weight(16)}


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (float("nan"), r"weights must be finite numbers, got \[nan\]"),
        (float("-inf"), r"weights must be finite numbers, got \[-inf\]"),
        ("1", r"weights must be finite numbers, got \['1'\]"),
        (1e40, r"1 weights of model\.norm\.weight would be infinite or NaN: torch\.float32 holds numbers up to 3\.4"),
    ],
)  # fmt: skip
def test_weights_that_leave_infinities_are_refused(base, tmp_path, weight, match):
    adapter = write_adapter(tmp_path / "a", NORM)
    refuse(base, [adapter], tmp_path, ConfigError, match, weights=[weight])


def test_what_the_base_or_the_result_cannot_hold_is_refused_in_its_dtype(tmp_path):
    base = save_base(tmp_path, llama(), torch.float16)
    adapter = write_adapter(tmp_path / "a", NORM)
    match = r"torch\.float16 holds numbers up to 6\.55e\+04\. Nothing was written"
    refuse(base, [adapter], tmp_path, ConfigError, match, weights=[140_000.0])
    assert merge_checkpoint(base, [adapter], tmp_path / "most", weights=[130_000.0]).num_weights == 1
    assert Checkpoint(tmp_path / "most").tensor("model.norm.weight")[1] == 65_000
    wide = merge_checkpoint(base, [adapter], tmp_path / "wide", weights=[140_000.0], dtype=torch.float32)
    assert Checkpoint(wide.directory).tensor("model.norm.weight")[1] == 70_001
    refuse(wide.directory, [adapter], tmp_path, ConfigError, match, dtype=torch.float16)


def test_infinities_of_the_base_are_its_own(tmp_path):
    model = llama()
    model.model.norm.weight.data[3] = float("inf")
    base = save_base(tmp_path, model)
    merged = merge_checkpoint(base, [write_adapter(tmp_path / "a", NORM)], tmp_path / "out", dtype=torch.bfloat16)
    norm = Checkpoint(merged.directory).tensor("model.norm.weight")
    assert norm[:4].tolist() == [1.0, 1.5, 1.0, float("inf")]

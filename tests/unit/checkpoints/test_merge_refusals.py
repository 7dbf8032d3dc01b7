"""Merging into a checkpoint on disk: what is refused, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertModel

from peft_sparse import merge_checkpoint
from peft_sparse.checkpoints import native
from peft_sparse.checkpoints.shards import WEIGHTS, Checkpoint
from peft_sparse.errors import ConfigError, FormatError
from tests.support.merging import one_weight, save_base, write_adapter
from tests.support.models import bert, llama

pytestmark = pytest.mark.filterwarnings("ignore")


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
    base = save_base(tmp_path, bert(BertModel))
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


@pytest.mark.parametrize(
    ("match", "options"),
    [
        (r"dtype must be one of \['float32', .*got 'int8'", {"dtype": torch.int8}),
        (r"dtype must be one of .*got 'float8_e4m3fn'", {"dtype": torch.float8_e4m3fn}),
        ("weights must be a list with one number per adapter, got '1'", {"weights": "1"}),
        ("weights must be a list with one number per adapter, got 0.5", {"weights": 0.5}),
        ("max_shard_bytes must be an int >= 1, got '1GB'", {"max_shard_bytes": "1GB"}),
    ],
)
def test_arguments_of_another_kind_are_named(base, tmp_path, match, options):
    adapter = write_adapter(tmp_path / "a", {"model.norm.weight": one_weight(16)})
    refuse(base, [adapter], tmp_path, ConfigError, match, **options)

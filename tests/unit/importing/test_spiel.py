"""Adapters of the SpIEL fork of PEFT: the worked example, unsorted positions, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from peft_sparse import import_adapter, merge_checkpoint
from peft_sparse.checkpoints.adapter_files import read_adapter
from peft_sparse.checkpoints.shards import Checkpoint
from peft_sparse.errors import ConfigError, FormatError
from tests.support import models
from tests.support.foreign_files import bert, write_peft

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"
SETTINGS = {
    "peft_type": "SFT",
    "task_type": "CAUSAL_LM",
    "selection_algorithm": "rigl",
    "reselection_steps": 40,
    "selection_accumulation_steps": 7,
    "initial_reselection_rate": 0.3,
    "reselection_rate_policy": "cosine",
    "num_tunable_weights": 12,
    "density": 0.01,
    "dtype": "float32",
    "candidate_reselection_proportion": 0.2,
    "inference_mode": True,
}


def llama(kind: type = LlamaForCausalLM, **fields):
    return models.llama(kind, vocab_size=30, num_key_value_heads=2, **fields)


@pytest.fixture
def base(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def tensors(*, dtype=torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Positions as a reselection leaves them: not sorted; one value is zero."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module, numel, count in ((Q, 256, 5), (UP, 384, 7)):
        indices = torch.randperm(numel, generator=generator)[:count].to(torch.int32)
        values = torch.randn(count, generator=generator).to(dtype)
        values[2] = 0
        found |= {f"{module}.sft_delta.values": values, f"{module}.sft_delta.indices": indices}
    return found


def settings(base, **changes):
    counts = {Q: 5, UP: 7}
    return {**SETTINGS, "base_model_name_or_path": str(base), "num_deltas": counts, **changes}


def test_the_worked_example(tmp_path):
    # A weight of 3 x 4 with +.1 at (1, 2) and -.3 at (2, 0): the flat positions are 6 and 8.
    config = LlamaConfig(
        vocab_size=9, hidden_size=4, intermediate_size=3, num_hidden_layers=1, num_attention_heads=1, head_dim=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    module = "model.layers.0.mlp.up_proj"
    values, indices = torch.tensor([0.1, -0.3]), torch.tensor([6, 8], dtype=torch.int32)
    content = {f"{module}.sft_delta.values": values, f"{module}.sft_delta.indices": indices}
    write_peft(tmp_path / "sft", settings(tmp_path / "base", num_deltas={module: 2}), content)
    import_adapter(tmp_path / "sft", tmp_path / "out")
    found = read_adapter(tmp_path / "out").deltas[f"{module}.weight"]
    assert found.shape == (3, 4)
    assert torch.equal(found.to_dense(), torch.tensor([[0, 0, 0, 0], [0, 0, 0.1, 0], [-0.3, 0, 0, 0]]))


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_the_import_is_adding_at_the_positions(tmp_path, base, pickled, dtype):
    content = tensors(dtype=dtype)
    write_peft(tmp_path / "sft", settings(base), content, pickle=pickled)
    imported = import_adapter(tmp_path / "sft", tmp_path / "out")
    assert (imported.kind, imported.num_weights, imported.base) == ("spiel", 12, str(base))  # zeros are kept
    expected = dict(llama().named_parameters())
    for module in (Q, UP):
        flat = expected[f"{module}.weight"].data.view(-1)
        positions = content[f"{module}.sft_delta.indices"].long()
        flat[positions] = flat[positions] + content[f"{module}.sft_delta.values"].float()
    merged = dict(PeftModel.from_pretrained(llama(), tmp_path / "out").merge_and_unload().named_parameters())
    assert {n for n in expected if not torch.equal(merged[n], expected[n])} == set()
    merge_checkpoint(base, [tmp_path / "out"], tmp_path / "merged")
    on_disk = Checkpoint(tmp_path / "merged")
    assert {n for n in on_disk.names() if not torch.equal(on_disk.tensor(n), expected[n])} == set()
    assert read_adapter(tmp_path / "out").config["values_dtype"] == str(dtype).split(".")[1]


def test_training_can_go_on_by_the_same_settings(tmp_path, base):
    write_peft(tmp_path / "sft", settings(base), tensors())
    import_adapter(tmp_path / "sft", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["method"], config["num_weights"], config["task_type"]) == ("spiel_ag", 12, "CAUSAL_LM")
    assert (config["reselection_steps"], config["estimation_steps"]) == (40, 7)
    assert (config["initial_reselection_rate"], config["reselection_schedule"]) == (0.3, "cosine")
    assert config["replace_all_first"] is False
    assert config["provenance"]["settings"]["selection_algorithm"] == "rigl"
    assert config["provenance"]["format"] == "spiel"
    write_peft(tmp_path / "ma", settings(base, selection_algorithm="sm3"), tensors())
    import_adapter(tmp_path / "ma", tmp_path / "out2")
    assert json.loads((tmp_path / "out2" / "adapter_config.json").read_text())["method"] == "spiel_ma"
    # Settings that no run of ours could have do not stand in the way of the weights.
    write_peft(tmp_path / "odd", settings(base, initial_reselection_rate=7.0), tensors())
    import_adapter(tmp_path / "odd", tmp_path / "out3")
    assert json.loads((tmp_path / "out3" / "adapter_config.json").read_text())["method"] == "fixed"


@pytest.mark.parametrize("saved", [["score"], None])
def test_heads_and_embeddings_that_came_along(tmp_path, saved):
    """The PEFT that the fork was made of saves the heads of a task, and does not name them in the config."""
    model = llama(LlamaForSequenceClassification, num_labels=3)
    model.save_pretrained(tmp_path / "base")
    head, embeddings = torch.randn(3, 16), torch.randn(30, 16)
    content = {**tensors(), "score.weight": head, "model.embed_tokens.weight": embeddings}
    config = settings(tmp_path / "base", task_type="SEQ_CLS", modules_to_save=saved)
    write_peft(tmp_path / "sft", config, content)
    imported = import_adapter(tmp_path / "sft", tmp_path / "out")
    assert (imported.heads, imported.left_out) == (("score",), ("model.embed_tokens.weight",))
    merged = PeftModel.from_pretrained(llama(LlamaForSequenceClassification, num_labels=3), tmp_path / "out")
    assert torch.equal(merged.merge_and_unload().score.weight, head)


def test_a_head_that_is_named_by_its_end_comes_along(tmp_path):
    fields = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "vocab_size": 30, "max_position_embeddings": 20}
    config = DistilBertConfig(**fields, num_labels=3)
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    module = "distilbert.transformer.layer.0.attention.q_lin"
    delta = {"values": torch.ones(2), "indices": torch.tensor([7, 3], dtype=torch.int32)}
    heads = {"pre_classifier.weight": torch.randn(16, 16), "pre_classifier.bias": torch.randn(16)}
    heads |= {"classifier.weight": torch.randn(3, 16), "classifier.bias": torch.randn(3)}
    content = {**{f"{module}.sft_delta.{part}": tensor for part, tensor in delta.items()}, **heads}
    write_peft(tmp_path / "sft", settings(tmp_path / "base", task_type="SEQ_CLS", num_deltas={module: 2}), content)
    imported = import_adapter(tmp_path / "sft", tmp_path / "out")
    assert (set(imported.heads), imported.left_out) == ({"pre_classifier", "classifier"}, ())
    model = PeftModel.from_pretrained(DistilBertForSequenceClassification(config), tmp_path / "out").merge_and_unload()
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in heads.items())


@pytest.mark.parametrize("algorithm", ["acc_rigl", "acc_sm3", "global_alloc", None, 5])
def test_branches_that_change_the_base_are_refused(tmp_path, base, algorithm):
    write_peft(tmp_path / "sft", settings(base, selection_algorithm=algorithm), tensors())
    with pytest.raises(FormatError, match=r"selection_algorithm is .*only \['rigl', 'sm3'\] leave the base"):
        import_adapter(tmp_path / "sft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def broken(**changes):
    content = tensors()
    for key, value in changes.items():
        name = f"{Q}.sft_delta.{key}"
        if value is None:
            del content[name]
        else:
            content[name] = value
    return content


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (broken(), {"num_deltas": {Q: 5, UP: 8}}, r"up_proj holds 7 weights, but .*\(num_deltas\) says 8"),
        (broken(), {"num_deltas": {Q: 5}}, r"up_proj holds 7 weights, but .* says 0"),
        (broken(), {"num_deltas": {Q: 5, UP: 7, "model.x": 3}}, r"model.x holds 0 weights, but .* says 3"),
        (broken(), {"num_deltas": 5}, r"num_deltas must map modules to numbers, got a int"),
        (broken(indices=torch.tensor([1, 2, 2, 3, 4], dtype=torch.int32)), {}, r"an index is there twice"),
        (broken(indices=torch.tensor([1, 2, -2, 3, 4], dtype=torch.int32)), {}, r"must lie in \[0, 256\).*got -2 to 4"),
        (
            broken(indices=torch.tensor([1, 2, 256, 3, 4], dtype=torch.int32)),
            {},
            r"must lie in \[0, 256\).*1 to 256",
        ),
        (broken(indices=torch.tensor([1, 2, 3, 4], dtype=torch.int32)), {}, r"one value for each index"),
        (broken(indices=torch.arange(5.0)), {}, r"indices must be int32 or int64"),
        (broken(values=torch.tensor([1, 2, 3, 4, float("nan")])), {}, r"1 values are NaN or infinite"),
        (broken(indices=None), {}, r"holds only the values of .*q_proj"),
        (
            {**broken(), f"{Q}.sft_delta.other.values": torch.ones(5)},
            {},
            r"sft_delta.other.values', so several adapters were saved into one file",
        ),
        ({"score.weight": torch.ones(3)}, {}, r"holds no tensor of an adapter of the SpIEL fork"),
        (broken(), {"base_model_name_or_path": None}, r"does not say which base model it belongs to"),
        (broken(), {"base_model_name_or_path": "no/such"}, r"(?s)shapes, in which the positions count.*--base"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, base, content, changes, message):
    write_peft(tmp_path / "sft", settings(base, **changes), content)
    with pytest.raises((FormatError, ConfigError), match=message):
        import_adapter(tmp_path / "sft", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "sft"]


def test_another_base_is_refused_by_name(tmp_path, base):
    write_peft(tmp_path / "sft", settings(base), tensors())
    bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(FormatError, match=r"(?s)does not belong to .*bert: .* lacks 2 of the 2 parameters.*q_proj"):
        import_adapter(tmp_path / "sft", tmp_path / "out", base=tmp_path / "bert")
    # The config's own base cannot be had, and another place is given for it.
    write_peft(tmp_path / "moved", settings("gone/away"), tensors())
    assert import_adapter(tmp_path / "moved", tmp_path / "out", base=base).base == str(base)


def test_a_hostile_bin_is_refused(tmp_path, base):
    write_peft(tmp_path / "sft", settings(base), {})
    (tmp_path / "sft" / "adapter_model.safetensors").unlink()
    torch.save({"a": [print]}, tmp_path / "sft" / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"names __builtin__.print, which is not part of this format"):
        import_adapter(tmp_path / "sft", tmp_path / "out")
    torch.save({"a": [1]}, tmp_path / "sft" / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"holds 'a', which is no tensor"):
        import_adapter(tmp_path / "sft", tmp_path / "out")
    shared = torch.ones(1000)
    torch.save({f"{n}": shared for n in range(1000)}, tmp_path / "sft" / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"claims 4,000,000 bytes of tensors and holds [\d,]+"):
        import_adapter(tmp_path / "sft", tmp_path / "out")
    (tmp_path / "sft" / "adapter_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"has no adapter_model.safetensors"):
        import_adapter(tmp_path / "sft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_both_weight_files_are_refused(tmp_path, base):
    write_peft(tmp_path / "sft", settings(base), tensors())
    write_peft(tmp_path / "sft", settings(base), tensors(seed=1), pickle=True)
    with pytest.raises(ConfigError, match=r"holds adapter_model.safetensors and adapter_model.bin"):
        import_adapter(tmp_path / "sft", tmp_path / "out")


def test_the_file_is_ours(tmp_path, base):
    write_peft(tmp_path / "sft", settings(base), tensors())
    import_adapter(tmp_path / "sft", tmp_path / "out")
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert f"base_model.model.{Q}.sparse_ft_weight.values" in keys

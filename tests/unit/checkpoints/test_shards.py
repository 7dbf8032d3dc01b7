"""Checkpoints a tensor at a time: what is read, what is written, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from peft_sparse.checkpoints import shards
from peft_sparse.checkpoints.shards import INDEX, WEIGHTS, Checkpoint, ShardWriter, copy_companions
from peft_sparse.errors import ConfigError, FormatError
from tests.support.models import llama

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b.weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "c": torch.tensor(5, dtype=torch.int64),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[LlamaForCausalLM, Path]:
    model = llama(num_key_value_heads=2)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "many", max_shard_size="6KB")
    assert len(list((folder / "many").glob("*.safetensors"))) > 2
    return model, folder


def write(directory: Path, tensors: dict[str, torch.Tensor], **options) -> Path:
    with ShardWriter(directory, **options) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return directory


def write_halfway(directory: Path, **options) -> None:
    with ShardWriter(directory, **options) as writer:
        writer.add("a", torch.zeros(3))
        writer.add("b", torch.zeros(3))
        raise RuntimeError("on the way")


def assert_holds(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = Checkpoint(folder)
    assert set(checkpoint.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.dtype(name) == tensor.dtype
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.tensor(name), tensor)


@pytest.mark.parametrize("kind", ["one", "many"])
def test_reads_what_transformers_saved(saved, kind):
    model, folder = saved
    assert_holds(folder / kind, model.state_dict())
    checkpoint = Checkpoint(folder / kind)
    assert checkpoint.config["model_type"] == "llama"
    assert {name for names in checkpoint.shards.values() for name in names} == set(model.state_dict())
    for shard, names in checkpoint.shards.items():
        assert set(load_file(folder / kind / shard)) == set(names)
    assert "lm_head.weight" in checkpoint
    assert "lm_head" not in checkpoint


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path):
    folder = write(tmp_path / "out", TENSORS)
    Checkpoint(folder).tensor("a.weight").zero_()
    assert_holds(folder, TENSORS)


@pytest.mark.parametrize("limit", [1, 50, 60, 10**9])
def test_transformers_reads_what_is_written(saved, tmp_path, limit):
    model, folder = saved
    checkpoint = Checkpoint(folder / "many")
    with ShardWriter(tmp_path / "deep" / "out", max_shard_bytes=limit * 100) as writer:
        for name in checkpoint.names():
            writer.add(name, checkpoint.tensor(name))
        copy_companions(checkpoint, writer.staging, changed={"note": 1})
    assert_holds(tmp_path / "deep" / "out", model.state_dict())
    assert Checkpoint(tmp_path / "deep" / "out").config == {**checkpoint.config, "note": 1}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "out")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_shards_keep_to_their_size(tmp_path):
    tensors = {str(i): torch.zeros(size) for i, size in enumerate([10, 10, 30, 5, 5, 10])}
    folder = write(tmp_path / "out", tensors, max_shard_bytes=80)
    assert sorted((folder / INDEX).parent.glob("*.safetensors")) == [
        folder / f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    found = [{name for name, file in index(folder)["weight_map"].items() if file.startswith(f"model-0000{i}")}
              for i in (1, 2, 3)]  # fmt: skip
    assert found == [{"0", "1"}, {"2"}, {"3", "4", "5"}]
    assert index(folder)["metadata"]["total_size"] == 280


def index(folder: Path) -> dict:
    return json.loads((folder / INDEX).read_text())


def test_nothing_is_left_of_a_write_that_failed(tmp_path):
    with pytest.raises(RuntimeError, match="on the way"):
        write_halfway(tmp_path / "out", max_shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_cannot_be_written_twice(tmp_path):
    with ShardWriter(tmp_path / "out", max_shard_bytes=1) as writer:
        writer.add("a", torch.zeros(3))
        writer.add("b", torch.zeros(3))
        with pytest.raises(FormatError, match="tensor 'a' is written twice"):
            writer.add("a", torch.zeros(3))


def test_a_directory_with_something_in_it_is_replaced_only_when_asked(tmp_path):
    folder = write(tmp_path / "out", TENSORS, max_shard_bytes=1)
    (folder / "notes.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"out exists and is not empty\. .* overwrite=True"):
        ShardWriter(folder)
    assert_holds(folder, TENSORS)
    replaced = write(folder, {"z": torch.ones(2)}, overwrite=True)
    assert_holds(replaced, {"z": torch.ones(2)})
    assert sorted(path.name for path in folder.iterdir()) == [WEIGHTS, "notes.md"]


# What transformers reads beside whichever weights are there, and what it does not.
LOOKED_FOR = ["added_tokens.json", "chat_template.jinja", "generation_config.json", "spiece.model", "vocab.txt"]
OWN = ["eval.json", "model.py", "notes.txt"]


def test_the_tokenizer_and_templates_of_another_model_go_with_its_weights(tmp_path):
    folder = write(tmp_path / "out", TENSORS)
    (folder / "additional_chat_templates").mkdir()
    for name in (*LOOKED_FOR, *OWN, "additional_chat_templates/rag.jinja"):
        (folder / name).write_text("old")
    with ShardWriter(folder, overwrite=True) as writer:
        writer.add("z", torch.ones(2))
        (writer.staging / "vocab.txt").write_text("new")
    assert sorted(path.name for path in folder.iterdir()) == sorted([*OWN, WEIGHTS, "vocab.txt"])
    assert (folder / "vocab.txt").read_text() == "new"


def test_an_overwrite_that_failed_leaves_the_old_checkpoint(tmp_path):
    folder = write(tmp_path / "out", TENSORS)
    with pytest.raises(RuntimeError, match="on the way"):
        write_halfway(folder, overwrite=True)
    assert_holds(folder, TENSORS)
    assert [path.name for path in folder.iterdir()] == [WEIGHTS]


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="out is a file, not a directory"):
        ShardWriter(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("given", [0, -1, "1GB", True, 1.5])
def test_the_size_of_shards_is_a_whole_number(tmp_path, given):
    with pytest.raises(ConfigError, match=f"max_shard_bytes must be an int >= 1, got {given!r}"):
        ShardWriter(tmp_path / "out", max_shard_bytes=given)
    assert not list(tmp_path.iterdir())


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(FormatError, match=r"no safetensors weights .* but pickled ones, and reading those runs"):
        Checkpoint(tmp_path)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(FormatError, match=r"no safetensors weights \(model\.safetensors or model\.safetensors\.index"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("source", ["no/such/thing", "peft-sparse-tests/none-such"])
def test_neither_directory_nor_repository(source):
    with pytest.raises(FormatError, match=f"'{source}' is neither a directory nor a repository on the Hub that can"):
        Checkpoint(source)


@pytest.mark.parametrize("kind", ["one", "many"])
def test_a_repository_gives_what_is_needed_and_no_more(saved, tmp_path, monkeypatch, kind):
    model, folder = saved
    asked = []

    def download(repo_id, *, allow_patterns, ignore_patterns, revision):
        asked.append((repo_id, revision))
        for path in (folder / kind).iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, tmp_path)
        return str(tmp_path)

    (folder / kind / "model.fp16.safetensors").write_bytes(b"another variant of the same")
    monkeypatch.setattr(shards, "snapshot_download", download)
    checkpoint = Checkpoint("me/model", revision="v1")
    assert set(asked) == {("me/model", "v1")}
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "model.fp16.safetensors").exists()


def test_an_unknown_tensor(tmp_path):
    checkpoint = Checkpoint(write(tmp_path / "out", TENSORS))
    with pytest.raises(FormatError, match="has no tensor 'q'"):
        checkpoint.tensor("q")


def damaged(tmp_path: Path, change) -> Path:
    folder = write(tmp_path / "out", TENSORS, max_shard_bytes=1)
    content = index(folder)
    change(content, folder)
    (folder / INDEX).write_text(json.dumps(content))
    return folder


DAMAGES = {
    "a tensor too many": (lambda c, f: c["weight_map"].update(q="model-00001-of-00003.safetensors"),
                          "do not agree on 1 tensors, the first of which is 'q'"),
    "a path": (lambda c, f: c["weight_map"].update(q="../x.safetensors"), "no safetensors file beside it"),
    "no map": (lambda c, f: c.pop("weight_map"), "has no 'weight_map'"),
    "a missing shard": (lambda c, f: (f / "model-00002-of-00003.safetensors").unlink(), "is missing, which"),
    "a broken shard": (lambda c, f: (f / "model-00002-of-00003.safetensors").write_bytes(b"no"),
                       "not a readable safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    change, text = DAMAGES[damage]
    folder = damaged(tmp_path, change)
    with pytest.raises(FormatError, match=text):
        Checkpoint(folder)


def test_json_that_is_none(tmp_path):
    folder = write(tmp_path / "out", TENSORS, max_shard_bytes=1)
    (folder / INDEX).write_text("{")
    with pytest.raises(FormatError, match=r"index\.json is not valid JSON"):
        Checkpoint(folder)
    (folder / INDEX).write_text("[]")
    with pytest.raises(FormatError, match="must hold a JSON object, got list"):
        Checkpoint(folder)


def test_companions_are_the_small_files(saved, tmp_path):
    _, folder = saved
    source = tmp_path / "model"
    save = write(source, TENSORS)
    for name in ("config.json", "tokenizer.json", "merges.txt", "spiece.model", "modeling_own.py", "README.md"):
        (save / name).write_text("{}")
    (save / "onnx").mkdir()
    (save / "onnx" / "config.json").write_text("{}")
    found = [path.name for path in Checkpoint(source).companions()]
    assert found == ["config.json", "merges.txt", "modeling_own.py", "spiece.model", "tokenizer.json"]
    assert INDEX not in [path.name for path in Checkpoint(folder / "many").companions()]


def test_pieces_of_tokenizers_and_named_chat_templates_are_copied(tmp_path):
    save = write(tmp_path / "model", TENSORS)
    names = ["additional_chat_templates/rag.jinja", "bpe.codes", "qwen.tiktoken", "source.spm", "target.spm"]
    (save / "additional_chat_templates").mkdir()
    for name in names:
        (save / name).write_text(name)
    with ShardWriter(tmp_path / "copy") as writer:
        copy_companions(Checkpoint(tmp_path / "model"), writer.staging)
    assert [(tmp_path / "copy" / name).read_text() for name in names] == names


def test_a_single_file_goes_before_an_index(tmp_path):
    folder = write(tmp_path / "out", TENSORS, max_shard_bytes=1)
    save_file({"only": torch.ones(1)}, folder / WEIGHTS)
    assert Checkpoint(folder).names() == ["only"]

"""Adapters out of folders, the Hub and models, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model
from transformers import BertModel

from peft_sparse import ConfigError, FormatError, RandConfig, iter_deltas
from peft_sparse.checkpoints import adapter_files
from peft_sparse.inspection.reading import Head, adapter_of, read_adapter, read_adapters
from tests.support.known_adapters import DENSE, QUERY, first, save, second
from tests.support.models import bert


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].indices, other[name].indices) and torch.equal(one[name].values, other[name].values)
        for name in one
    )


def test_a_folder(tmp_path):
    heads = {"classifier.weight": torch.zeros(3, 2), "classifier.bias": torch.zeros(3, dtype=torch.bfloat16)}
    folder = save(tmp_path / "task", first(), heads=heads, seed=7)
    adapter = read_adapter(folder)
    assert (adapter.name, adapter.source, adapter.folder) == ("task", str(folder), folder)
    assert same(adapter.deltas, first())
    assert adapter.heads == (
        Head("classifier.bias", (3,), "bfloat16", 6),
        Head("classifier.weight", (3, 2), "float32", 24),
    )
    assert adapter.file_bytes == (folder / "adapter_model.safetensors").stat().st_size
    assert len(bytes.fromhex(adapter.digest)) == 32
    assert adapter.config["seed"] == 7


def test_the_digest_tells_adapters_apart(tmp_path):
    folders = [save(tmp_path / name, deltas) for name, deltas in {"a": first(), "b": first(), "c": second()}.items()]
    digests = [read_adapter(folder).digest for folder in folders]
    assert digests[0] == digests[1] != digests[2]


def test_a_hub_id_with_folder_and_revision(tmp_path, monkeypatch):
    folder = save(tmp_path / "language", first())
    asked = []

    def download(repo: str, name: str, **place: str | None) -> str:
        asked.append((repo, name, place))
        return str(folder / name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapter_files, "hf_hub_download", download)
    adapter = read_adapter("lab/adapters/xx/language@v1.0")
    assert asked[0] == ("lab/adapters", "adapter_config.json", {"subfolder": "xx/language", "revision": "v1.0"})
    assert same(adapter.deltas, first())
    read_adapter("lab/adapters")
    assert asked[-1] == ("lab/adapters", "adapter_model.safetensors", {"subfolder": None, "revision": None})


def test_what_the_hub_does_not_have(monkeypatch):
    def download(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no such repository\nsecond line")

    monkeypatch.setattr(adapter_files, "hf_hub_download", download)
    with pytest.raises(ConfigError, match=r"no folder 'no/where', and adapter_config.json .* Hub: no such repository$"):
        read_adapter("no/where")


def test_places_that_hold_no_adapter(tmp_path):
    save(tmp_path / "both" / "task", first())
    with pytest.raises(ConfigError, match=r"has no adapter_config.json. It holds the adapters \['task'\]"):
        read_adapter(tmp_path / "both")
    with pytest.raises(ConfigError, match=r"is a file\. Give the folder"):
        read_adapter(tmp_path / "both" / "task" / "adapter_config.json")
    with pytest.raises(ConfigError, match=r"There is no folder '\./nowhere/at/all'"):
        read_adapter("./nowhere/at/all")
    (tmp_path / "both" / "task" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no adapter_model.safetensors"):
        read_adapter(tmp_path / "both" / "task")


def test_a_pickle_is_not_opened(tmp_path):
    folder = save(tmp_path / "old", first())
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(FormatError, match="a pickle, which is never opened"):
        read_adapter(folder)


def test_lora_is_refused(tmp_path):
    model = get_peft_model(bert(BertModel), LoraConfig(target_modules=["query"], r=1))
    model.save_pretrained(tmp_path / "lora")
    with pytest.raises(FormatError, match=r"lora' is no sparse adapter: adapter_config.json says peft_type 'LORA'"):
        read_adapter(tmp_path / "lora")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "adapter_config.json must hold a JSON object, got list"),
        ("{}", "is no sparse adapter: adapter_config.json says peft_type None"),
        ('{"peft_type": "SPARSE_FT", "counts": [1]}', "counts must map parameter names to numbers"),
        ('{"peft_type": "SPARSE_FT", "counts": {"a": -1}}', "counts must map parameter names to numbers"),
    ],
)
def test_a_broken_config(tmp_path, text, message):
    folder = save(tmp_path / "broken", first())
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        read_adapter(folder)


def test_a_damaged_file(tmp_path):
    path = save(tmp_path / "damaged", first()) / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"damaged/adapter_model\.safetensors"):
        read_adapter(tmp_path / "damaged")


def test_counts_of_another_file(tmp_path):
    folder = save(tmp_path / "swapped", first())
    config = json.loads((folder / "adapter_config.json").read_text())
    config["counts"][DENSE] = 2
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"holds 1 weights, but adapter_config\.json"):
        read_adapter(folder)


def test_names_that_tell_adapters_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("one/checkpoint", "two/checkpoint", "task"):
        save(Path(place), first())
    found = read_adapters(["one/checkpoint/", "two/checkpoint", "task"])
    assert [adapter.name for adapter in found] == ["one/checkpoint", "two/checkpoint", "task"]
    with pytest.raises(ConfigError, match="'task' is given more than once"):
        read_adapters(["task", "task/"])


def test_an_adapter_of_a_model_is_that_of_its_file(tmp_path):
    model = get_peft_model(bert(BertModel), RandConfig(density=0.1, init_weights=False, seed=3), "mine")
    model.save_pretrained(tmp_path)
    from_model, from_file = adapter_of(model, "mine"), read_adapter(tmp_path / "mine")
    assert same(from_model.deltas, from_file.deltas)
    assert sum(part.count for part in from_model.deltas.values()) == sum(
        part.count for _, _, _, part in iter_deltas(model, "mine")
    )
    assert from_model.config["peft_type"] == "SPARSE_FT"
    assert {key: from_model.config[key] for key in ("method", "density", "seed")} == {
        "method": "rand",
        "density": 0.1,
        "seed": 3,
    }
    assert (from_model.name, from_model.file_bytes, from_model.digest) == ("mine", None, None)
    with pytest.raises(ConfigError, match=r"must be a sparse adapter, one of \['mine'\], got 'other'"):
        adapter_of(model, "other")
    with pytest.raises(
        ConfigError, match=r"must be a sparse adapter, and this model has none|must carry a PEFT adapter"
    ):
        adapter_of(bert(BertModel))
    assert QUERY in from_model.deltas

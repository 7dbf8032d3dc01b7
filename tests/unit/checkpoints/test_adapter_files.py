"""One spelling for all who read saved adapters: folders, and ids of the Hub with folder and revision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from peft_sparse import ConfigError, FormatError, GivenConfig, layer_budget_from
from peft_sparse.checkpoints import adapter_files, native
from peft_sparse.checkpoints.adapter_files import find_file, need_file, read_adapter, read_config
from peft_sparse.core.delta import SparseDelta
from peft_sparse.inspection.reading import read_adapter as read_to_look_at
from peft_sparse.tuners.sparse_ft.known_support import given_support

INDICES = [1, 5]
ID = "lab/adapters/xx/language@v1.0"


@pytest.fixture
def folder(tmp_path) -> Path:
    deltas = {"layer.0.weight": SparseDelta(torch.tensor(INDICES, dtype=torch.int32), torch.tensor([1.0, 2.0]), (2, 3))}
    (tmp_path / "saved").mkdir()
    save_file(native.build(deltas, {"head.weight": torch.ones(2)}), tmp_path / "saved" / native.SOURCE)
    config = {"peft_type": "SPARSE_FT", "counts": {"layer.0.weight": 2}}
    (tmp_path / "saved" / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "saved"


@pytest.fixture
def hub(folder, monkeypatch) -> list[tuple]:
    """A Hub with one adapter, which is cached; what was asked of it."""
    asked = []

    def download(repo: str, name: str, *, subfolder: str | None, revision: str | None) -> str:
        asked.append((repo, subfolder, revision))
        if not (folder / name).is_file():
            raise LocalEntryNotFoundError(f"no {name}\nsecond line")
        return str(folder / name)

    monkeypatch.setattr(adapter_files, "hf_hub_download", download)
    monkeypatch.setattr(adapter_files, "_is_cached", lambda repo: True)
    return asked


def test_what_the_files_hold(folder):
    found = read_adapter(folder)
    assert (found.source, found.folder) == (str(folder), folder)
    assert found.deltas["layer.0.weight"].indices.tolist() == INDICES
    assert {name: tensor.tolist() for name, tensor in found.others.items()} == {"head.weight": [1.0, 1.0]}
    assert len(bytes.fromhex(found.digest)) == 32


@pytest.mark.parametrize(
    ("where", "place"),
    [
        ("gpt2", ("gpt2", None, None)),
        ("lab/adapters", ("lab/adapters", None, None)),
        ("lab/adapters@main", ("lab/adapters", None, "main")),
        ("lab/adapters/xx/", ("lab/adapters", "xx", None)),
        (ID, ("lab/adapters", "xx/language", "v1.0")),
    ],
)
def test_ids_of_the_hub(hub, where, place):
    assert find_file(where, "adapter_config.json").is_file()
    assert find_file(where, "nothing.json") is None
    assert set(hub) == {place}


def test_every_reader_takes_the_same_ids(hub):
    assert list(layer_budget_from(ID).values()) == [1.0]
    assert given_support(GivenConfig(support=ID))["layer.0.weight"].tolist() == INDICES
    assert read_to_look_at(ID).deltas["layer.0.weight"].count == 2
    assert set(hub) == {("lab/adapters", "xx/language", "v1.0")}


def test_a_revision_beside_the_id(hub):
    find_file("lab/adapters", "adapter_config.json", revision="v2")
    find_file("lab/adapters@v2", "adapter_config.json", revision="v2")
    assert set(hub) == {("lab/adapters", None, "v2")}
    with pytest.raises(ConfigError, match=r"'lab/adapters@v1' names a revision, and another one .* 'v2'"):
        find_file("lab/adapters@v1", "adapter_config.json", revision="v2")


def test_what_is_not_there(hub, folder):
    with pytest.raises(ConfigError, match=r"'lab/adapters', and other\.json .* from the Hub: no other\.json$"):
        need_file("lab/adapters", "other.json")
    with pytest.raises(ConfigError, match=r"saved' has no other\.json\. Give the folder of an adapter"):
        need_file(folder, "other.json")
    assert find_file(folder, "other.json") is None
    with pytest.raises(ConfigError, match=r"There is no folder '\./gone', and it is no id of the Hub"):
        find_file("./gone", "other.json")


def test_what_is_not_cached_where_the_hub_cannot_be_reached(hub, monkeypatch):
    monkeypatch.setattr(adapter_files, "_is_cached", lambda repo: False)
    with pytest.raises(ConfigError, match=r"cannot be had from the Hub: no nothing\.json$"):
        find_file("lab/adapters", "nothing.json")


def test_the_config_of_another_type_is_read_and_its_weights_are_not(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert read_config(folder) == {"peft_type": "LORA"}
    for reader in (read_adapter, read_to_look_at, layer_budget_from):
        with pytest.raises(FormatError, match=r"saved' is no sparse adapter: .* says peft_type 'LORA'"):
            reader(folder)

"""Export to `pytorch_diff.bin`: the worked example byte for byte, round trips, and what the format cannot hold."""

from __future__ import annotations

import json
import pickletools
import zipfile

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from peft_sparse import RandConfig, export_adapter, import_adapter
from peft_sparse.checkpoints.adapter_files import read_adapter
from peft_sparse.checkpoints.native import build
from peft_sparse.checkpoints.output import save_adapter
from peft_sparse.core.delta import SparseDelta
from peft_sparse.errors import ConfigError, FormatError
from peft_sparse.importing.gap_lists import decode_gap_list, encode_gap_list
from peft_sparse.importing.restricted_pickle import integers
from tests.support.foreign_files import bert, differences, heads_of, write_diff


def of_one(folder, delta: SparseDelta, name: str = "m.w.weight") -> None:
    config = RandConfig(num_weights=max(delta.count, 1), counts={name: delta.count}, target_modules=["w"])
    save_adapter(folder, build({name: delta}), config)


def test_the_worked_example_byte_for_byte(tmp_path):
    # A 3 x 4 weight with +.1 at (1, 2) and -.3 at (2, 0): column-major positions 7 and 2, so [2, 5] and [-.3, .1].
    delta = SparseDelta(torch.tensor([6, 8], dtype=torch.int32), torch.tensor([0.1, -0.3]), (3, 4))
    of_one(tmp_path / "a", delta, "model.fc.weight")
    export_adapter(tmp_path / "a", tmp_path / "out")
    found = torch.load(tmp_path / "out" / "pytorch_diff.bin", weights_only=True)
    assert found.keys() == {"diffs", "abs"}
    assert found["abs"] == {}
    item = found["diffs"]["model.fc.weight"]
    assert item.keys() == {"size", "index_steps", "values"}
    assert item["size"] == torch.Size([3, 4])
    assert type(item["size"]) is torch.Size
    assert item["index_steps"] == [2, 5]
    assert {type(step) for step in item["index_steps"]} == {int}
    assert item["values"].tolist() == torch.tensor([-0.3, 0.1]).tolist()
    with zipfile.ZipFile(tmp_path / "out" / "pytorch_diff.bin") as archive:
        root = archive.namelist()[0].split("/")[0]
        raw = archive.read(f"{root}/data/0")
        pickled = archive.read(f"{root}/data.pkl")
    assert raw == bytes.fromhex("9a9999be cdcccc3d")
    assert {a for op, a, _ in pickletools.genops(pickled) if op.name == "GLOBAL"} == {
        "torch Size",
        "torch._utils _rebuild_tensor_v2",
        "torch FloatStorage",
        "collections OrderedDict",
    }


def test_the_other_worked_example():
    delta = SparseDelta.from_dense(torch.tensor([[0, 0.5, 0], [-0.25, 0, 2]]))
    assert encode_gap_list(delta)[0] == [1, 1, 3]
    assert encode_gap_list(delta)[1].tolist() == [-0.25, 0.5, 2]
    of_nothing = encode_gap_list(SparseDelta.empty((3, 3)))
    assert of_nothing[0] == []
    assert of_nothing[1].shape == (0,)
    sparse_head = SparseDelta.from_dense(torch.tensor([[0.0, 0], [3, 0]]))
    assert encode_gap_list(sparse_head)[0] == [1]


def test_three_dimensions_and_positions_beyond_32_bits():
    shape = (2, 3, 5)
    dense = torch.zeros(shape)
    dense[1, 0, 4], dense[0, 2, 3], dense[1, 2, 0] = 1, 2, 3
    # i0 + 2 i1 + 6 i2
    gaps, values = encode_gap_list(SparseDelta.from_dense(dense))
    assert (gaps, values.tolist()) == ([5, 17, 3], [3, 2, 1])
    large = (3, 2**31)
    delta = decode_gap_list(integers([3 * 2**31 - 1]), torch.ones(1), large, name="it")
    assert delta.indices.tolist() == [3 * 2**31 - 1]
    assert delta.indices.dtype == torch.int64
    delta = decode_gap_list(integers([1, 3 * 2**30]), torch.tensor([1.0, 2.0]), large, name="it")
    assert delta.indices.tolist() == [2**31, 2**31 + 2**30]
    assert encode_gap_list(delta)[0] == [1, 3 * 2**30]


def test_import_export_import_is_the_same_file(tmp_path):
    model = bert(num_labels=7)
    write_diff(tmp_path / "sft", differences(model), heads_of(model))
    import_adapter(tmp_path / "sft", tmp_path / "a", base="some/base")
    exported = export_adapter(tmp_path / "a", tmp_path / "out")
    assert set(exported.heads) == {"classifier.weight", "classifier.bias"}
    import_adapter(tmp_path / "out", tmp_path / "b", base="some/base", task_type="TOKEN_CLS")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert exported.num_weights == read_adapter(tmp_path / "b").config["num_weights"]


def test_an_adapter_of_ours_goes_there_and_back(tmp_path):
    model = bert(num_labels=7)
    config = RandConfig(density=0.05, target_modules="all", init_weights=False, modules_to_save=["classifier"])
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path / "ours")
    export_adapter(tmp_path / "ours", tmp_path / "theirs")
    import_adapter(tmp_path / "theirs", tmp_path / "again", base="some/base")
    ours, again = read_adapter(tmp_path / "ours"), read_adapter(tmp_path / "again")
    assert ours.digest == again.digest
    assert ours.config["counts"] == again.config["counts"]


def test_a_head_that_is_named_by_its_end_goes_along(tmp_path):
    """DistilBERT's "pre_classifier": PEFT trains it whole where "classifier" is named, and so do we."""
    fields = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "vocab_size": 30, "max_position_embeddings": 20}
    model = DistilBertForSequenceClassification(DistilBertConfig(**fields, num_labels=3))
    model = get_peft_model(model, RandConfig(density=0.05, init_weights=False, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "ours")
    exported = export_adapter(tmp_path / "ours", tmp_path / "theirs")
    heads = {f"{module}.{part}" for module in ("pre_classifier", "classifier") for part in ("weight", "bias")}
    assert set(exported.heads) == heads
    import_adapter(tmp_path / "theirs", tmp_path / "again", base="some/base")
    ours, again = read_adapter(tmp_path / "ours"), read_adapter(tmp_path / "again")
    assert ours.others.keys() == again.others.keys() == heads
    assert all(torch.equal(ours.others[name], again.others[name]) for name in heads)


def test_it_is_written_in_one_step(tmp_path, monkeypatch):
    of_one(tmp_path / "a", SparseDelta.from_dense(torch.eye(3)))
    export_adapter(tmp_path / "a", tmp_path / "out")
    before = (tmp_path / "out" / "pytorch_diff.bin").read_bytes()
    with pytest.raises(ConfigError, match=r"exists and is not empty"):
        export_adapter(tmp_path / "a", tmp_path / "out")

    def half(content, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        export_adapter(tmp_path / "a", tmp_path / "out", overwrite=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["pytorch_diff.bin"]
    assert (tmp_path / "out" / "pytorch_diff.bin").read_bytes() == before


def test_what_the_format_has_no_place_for_is_refused(tmp_path):
    of_one(tmp_path / "a", SparseDelta.from_dense(torch.eye(3)))
    with pytest.raises(ConfigError, match=r"to must be one of .'composable-sft', .*, got 'gguf'"):
        export_adapter(tmp_path / "a", tmp_path / "out", to="gguf")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    embeddings = {"base_model.model.e.weight": torch.ones(2, 2)}
    save_file({**tensors, **embeddings}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"brings 'e.weight' beside the adapter"):
        export_adapter(tmp_path / "a", tmp_path / "out")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trainable_token_indices": [1]}))
    with pytest.raises(ConfigError, match=r"trains rows of the embedding whole"):
        export_adapter(tmp_path / "a", tmp_path / "out")
    path.write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(FormatError, match=r"is no sparse adapter"):
        export_adapter(tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()

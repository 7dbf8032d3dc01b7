"""The reader of foreign pickles and of torch's files: what pickle and torch read, and the format before the zip."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from peft_sparse.errors import FormatError
from peft_sparse.importing import restricted_pickle
from peft_sparse.importing.composable_sft import read_composable_sft
from peft_sparse.importing.restricted_pickle import Unpickler, integers
from peft_sparse.importing.torch_file import TorchFile
from tests.support.foreign_files import NAME, Calls, encode, pickled, refused

# The reader itself


def load(content: bytes):
    return Unpickler(content, names={}, persistent=lambda identifier: None, source="it").load()


def test_plain_values_are_read_as_pickle_reads_them():
    value = {
        "a": [1, 300, 70000, -5, 2**40, -(2**40)],
        "b": (None, True, False, 1.5, ()),
        "é\udc80": {},
        "n": [[], [0]],
    }
    assert load(pickled(value)) == value
    shared = [1, 2]
    found = load(pickled({"x": shared, "y": shared}))
    assert found["x"] is found["y"]


@pytest.mark.parametrize("highest", [255, 256, 2**16, 2**31 - 1, 2**40])
@pytest.mark.parametrize("length", [0, 1, 2, 999, 1000, 1001, 2001, 25_000])
def test_lists_of_integers_are_read_as_pickle_reads_them(highest, length):
    numbers = np.random.default_rng(length).integers(-highest if highest > 2**16 else 0, highest, length).tolist()
    found = integers(load(pickled({"x": numbers}))["x"])
    assert found.dtype == np.int64
    assert found.tolist() == numbers


def test_long_lists_are_read_in_batches(monkeypatch):
    batches = []
    decode = restricted_pickle._decode_batch
    monkeypatch.setattr(restricted_pickle, "_decode_batch", lambda raw: batches.append(len(raw)) or decode(raw))
    load(pickled([5] * 10_000))
    assert batches == [2000] * 10


def test_a_list_that_holds_itself_is_no_list_of_integers():
    found = load(b"\x80\x02]q\x00h\x00a.")
    assert found[0] is found
    assert integers(found) is None


def test_the_numbers_of_numpy_are_read(tmp_path):
    torch.save({"diffs": {NAME: encode(torch.eye(3))}}, tmp_path / "file.bin")
    found = TorchFile(tmp_path / "file.bin").content["diffs"][NAME]["index_steps"]
    assert integers(found).tolist() == [0, 4, 4]
    for kind in (np.int8, np.uint16, np.int32, np.uint64):
        torch.save([kind(100)], tmp_path / "file.bin")
        assert TorchFile(tmp_path / "file.bin").content == [100]
    for kind in (np.float64, np.bool_):
        torch.save([kind(1)], tmp_path / "file.bin")
        with pytest.raises(FormatError, match=r"only integers are part of this format"):
            TorchFile(tmp_path / "file.bin")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_tensors_are_read_as_torch_reads_them(tmp_path, dtype):
    base = torch.randn(6, 4).to(dtype)
    saved = {"plain": base.clone(), "view": base[1:3], "turned": base.t(), "scalar": base[0, 0], "none": base[:0]}
    torch.save(saved, tmp_path / "file.bin")
    file = TorchFile(tmp_path / "file.bin")
    for name, expected in torch.load(tmp_path / "file.bin", weights_only=True).items():
        found = file.tensor(file.content[name])
        assert found.dtype == dtype
        assert torch.equal(found, expected)


def test_parameters_and_state_dicts_are_read(tmp_path):
    layer = torch.nn.Linear(3, 2)
    torch.save(layer.state_dict(), tmp_path / "state.bin")
    found = TorchFile(tmp_path / "state.bin").tensors()
    assert torch.equal(found["weight"], layer.weight)
    assert torch.equal(found["bias"], layer.bias)
    torch.save(dict(layer.named_parameters()), tmp_path / "parameters.bin")
    assert torch.equal(TorchFile(tmp_path / "parameters.bin").tensors()["weight"], layer.weight)


def old_file(folder, content):
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "pytorch_diff.bin", _use_new_zipfile_serialization=False)
    return folder / "pytorch_diff.bin"


def test_the_format_before_the_zip_is_read(tmp_path):
    content = {"diffs": {NAME: encode(torch.eye(3)), "bert.b.weight": encode(torch.ones(2, 2, dtype=torch.bfloat16))}}
    path = old_file(tmp_path / "sft", {**content, "abs": {"classifier.bias": torch.arange(4.0)}})
    found = read_composable_sft(path, source="it")
    assert torch.equal(found.deltas[NAME].to_dense(), torch.eye(3))
    assert torch.equal(found.deltas["bert.b.weight"].to_dense(), torch.ones(2, 2, dtype=torch.bfloat16))
    assert found.heads["classifier.bias"].tolist() == [0, 1, 2, 3]


def test_damage_and_harm_in_the_format_before_the_zip_are_refused(tmp_path):
    path = old_file(tmp_path / "sft", {"diffs": {NAME: encode(torch.eye(3))}, "abs": {}})
    whole = path.read_bytes()
    for length in range(15, len(whole), 11):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"pytorch_diff.bin"):
            read_composable_sft(path, source="it")
    path.write_bytes(whole + b"more")
    refused(path.parent, r"goes on after its tensors have ended")
    path.write_bytes(whole[:-20] + (2**40).to_bytes(8, "little") + whole[-12:])
    refused(path.parent, r"claims 3 elements of torch.float32 and holds 12 bytes")
    path.write_bytes(whole.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))
    refused(path.parent, r"on a big-endian machine")
    old_file(tmp_path / "sft", {"diffs": Calls(os.system, "true")})
    refused(path.parent, r"names posix.system, which is not part of this format")

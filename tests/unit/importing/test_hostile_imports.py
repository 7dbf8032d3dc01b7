"""Files that mean harm, or are damaged: refused by name, nothing executed, nothing left behind."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from peft_sparse import import_adapter
from peft_sparse.errors import FormatError
from peft_sparse.importing import restricted_pickle
from peft_sparse.importing.composable_sft import read_composable_sft
from peft_sparse.importing.restricted_pickle import Unpickler, integers
from peft_sparse.importing.torch_file import TorchFile
from tests.support.foreign_files import encode, pickled, rewrite, write_diff, write_pickle

NAME = "bert.a.weight"


def refused(folder, message: str) -> None:
    """Importing is refused with this message, and leaves nothing."""
    before = sorted(os.listdir(folder.parent))
    with pytest.raises(FormatError, match=message):
        import_adapter(folder, folder.parent / "out", base="some/base")
    assert sorted(os.listdir(folder.parent)) == before


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Calls(os.system, "touch {marker}"), r"posix\.system|nt\.system"),
        (Calls(eval, "open('{marker}', 'w')"), r"__builtin__\.eval"),
        (Calls(exec, "open('{marker}', 'w')"), r"__builtin__\.exec"),
        (Calls(getattr, "x", "y"), r"__builtin__\.getattr"),
        (Calls(torch.load, "{marker}"), r"torch\.serialization\.load"),
        (Calls(torch.ones, 3), r"torch\._C\._VariableFunctions|__builtin__\.getattr|torch"),
        (Calls(__import__, "this"), r"__builtin__\.__import__"),
    ],
)
@pytest.mark.parametrize("place", ["whole", "in a list of steps", "behind the answer"])
def test_a_call_of_anything_else_is_refused_by_its_name(tmp_path, value, named, place):
    marker = tmp_path / "harm"
    function, arguments = value.call
    bomb = Calls(function, *(str(a).format(marker=marker) if isinstance(a, str) else a for a in arguments))
    content = {
        "whole": bomb,
        "in a list of steps": {"diffs": {NAME: {"size": (3,), "index_steps": [1, bomb], "values": 0}}},
        "behind the answer": {"diffs": {}, "abs": {}, "note": bomb},
    }[place]
    refused(write_pickle(tmp_path / "sft", pickled(content)), rf"names ({named})\S*, which is not part of this format")
    assert not marker.exists()


def test_names_through_attributes_and_odd_spellings_are_refused(tmp_path):
    for module, name in [
        ("torch", "Size.__class__"),
        ("torch.serialization", "load"),
        ("collections", "OrderedDict.fromkeys"),
        ("numpy", "load"),
        ("builtins", "eval"),
        ("_codecs", "decode"),
        ("torch._utils", "_rebuild_tensor"),
        ("", ""),
    ]:
        bomb = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")R."
        refused(write_pickle(tmp_path / "sft", bomb), r"names .*, which is not part of this format")


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_other_protocols_are_refused_by_number(tmp_path, protocol):
    found = r"no protocol that it names" if protocol < 2 else rf"protocol {protocol}"
    content = pickled({"diffs": {}, "abs": {}}, protocol)
    refused(write_pickle(tmp_path / "sft", content), rf"is pickled by {found}, and the format's is protocol 2")


HOSTILE = {
    # name: (pickle, what the error says)
    "opcodes of other protocols": (b"\x80\x02\x8c\x01a.", r"opcode b'\\x8c'"),
    "an instance": (b"\x80\x02(itorch\nSize\n.", r"opcode b'i'"),
    "an object": (b"\x80\x02ctorch\nSize\n)\x81.", r"opcode b'\\x81'"),
    "an extension": (b"\x80\x02\x82\x01.", r"opcode b'\\x82'"),
    "text that is evaluated": (b"\x80\x02S'a'\n.", r"opcode b'S'"),
    "a text longer than the file": (b"\x80\x02X\xff\xff\xff\xffabc.", r"is cut off"),
    "a number of a gigabyte": (b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".", r"an integer of 255 bytes"),
    "deep lists": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", r"is nested deeper"),
    "deep marks": (b"\x80\x02" + b"(" * 100_000 + b".", r"is nested deeper"),
    "deep tuples": (b"\x80\x02)" + b"\x85" * 20_000 + b".", r"holds no 'diffs' and no 'abs'"),
    "a deep tuple as a key": (b"\x80\x02})" + b"\x85" * 20_000 + b"Ns.", r"has a tuple as the key"),
    "a memo of four billion": (b"\x80\x02}r\xff\xff\xff\xff.", r"holds no 'diffs' and no 'abs'"),
    "recalling what was not stored": (b"\x80\x02h\x05.", r"recalls a value that it did not store"),
    "nothing to take": (b"\x80\x02a.", r"takes a value that is not there"),
    "nothing at all": (b"\x80\x02.", r"does not end in one value"),
    "a group that ends twice": (b"\x80\x02ee.", r"ends a group that has not begun"),
    "two values": (b"\x80\x02}}.", r"does not end in one value"),
    "a cut": (b"\x80\x02}", r"is cut off"),
    "a cut before the protocol": (b"\x80", r"is cut off"),
    "more behind the end": (b"\x80\x02}.cos\nsystem\n", r"goes on after its pickle has ended"),
    "a name without end": (b"\x80\x02c" + b"a" * 1000, r"is cut off in a name"),
    "calling a text": (b"\x80\x02X\x01\x00\x00\x00a)R.", r"calls a str, and the format calls only names"),
    "calling without a tuple": (b"\x80\x02ctorch\nSize\n]R.", r"the format calls only names"),
    "calling with too much": (b"\x80\x02ctorch\nSize\nK\x01K\x02\x86R.", r"calls torch.Size with what it cannot"),
    "a size below zero": (b"\x80\x02ctorch\nSize\nJ\xff\xff\xff\xff\x85\x85R.", r"at most 16 numbers >= 0"),
    "a size beyond any": (
        b"\x80\x02ctorch\nSize\nJ\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86\x85R.",
        r"fewer than 2\*\*48 elements",
    ),
    "setting a state": (b"\x80\x02ctorch\nSize\n}b.", r"sets the state of a _Name"),
    "setting slots of a dtype": (
        b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00i8\x85RN}X\x01\x00\x00\x00ccos\nsystem\ns\x86b.",
        r"names os\.system",
    ),
    "a dtype of the other end": (
        b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00i8\x85RK\x03X\x01\x00\x00\x00>\x86b.",
        r"sets the state of a NumpyDtype",
    ),
    "a dtype of objects": (b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R.", r"only integers are part.*'O8'"),
    "a number without its bytes": (
        b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00i8\x85RX\x01\x00\x00\x00a\x86R.",
        r"must have the bytes of its dtype",
    ),
    "a memory that is none": (b"\x80\x02X\x01\x00\x00\x00aQ.", r"names a tensor's memory in a way that torch"),
    "a tensor without a memory": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00K\x01\x85K\x01\x85\x89}tR.",
        r"it makes a tensor out of a memory",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_by_name(tmp_path, name):
    content, message = HOSTILE[name]
    tracemalloc.start()
    refused(write_pickle(tmp_path / "sft", content), message)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000


def tensor_pickle(count: int, *, shape=(4,), stride=(1,), offset: int = 0) -> bytes:
    """{"diffs": {name: {.., "values": a tensor with these claims}}}, by hand."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def numbers(values) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    storage += b"J" + struct.pack("<i", count) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"J" + struct.pack("<i", offset)
    tensor += numbers(shape) + numbers(stride) + b"\x89}tR"
    item = b"}(" + text("size") + numbers([9]) + text("index_steps") + b"](K\x01K\x01K\x01K\x01e" + text("values")
    return b"\x80\x02}" + text("diffs") + b"}" + text(NAME) + item + tensor + b"uss."


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"count": 5}, r"claims 5 elements of torch.float32 in 16 bytes"),
        ({"count": -4}, r"claims -4 elements"),
        ({"count": 4, "shape": (2**30,), "stride": (0,)}, r"a tensor of 1073741824 elements in a memory of 4"),
        ({"count": 4, "shape": (4,), "stride": (2,)}, r"a tensor of 4 elements in a memory of 4"),
        ({"count": 4, "offset": 1}, r"a tensor of 4 elements in a memory of 4"),
        ({"count": 4, "offset": 2**30}, r"a tensor of 4 elements in a memory of 4"),
        ({"count": 4, "shape": (2, 2)}, r"a stride for each dimension"),
        ({"count": 4, "shape": (2, 2), "stride": (2, 1)}, r"values must be a list of floating-point numbers"),
    ],
)
def test_a_tensor_that_claims_more_than_there_is(tmp_path, claims, message):
    refused(write_pickle(tmp_path / "sft", tensor_pickle(**claims), {"0": bytes(16)}), message)


def test_the_same_tensor_without_false_claims_is_read(tmp_path):
    write_pickle(tmp_path / "sft", tensor_pickle(4), {"0": np.arange(4, dtype="<f4").tobytes()})
    assert import_adapter(tmp_path / "sft", tmp_path / "out", base="some/base").num_weights == 4


def test_a_missing_memory_is_named(tmp_path):
    refused(write_pickle(tmp_path / "sft", tensor_pickle(4)), r"lacks the memory '0' of a tensor")


def item(**changes):
    return {"size": torch.Size([3]), "index_steps": [0, 1], "values": torch.ones(2), **changes}


@pytest.mark.parametrize(
    ("diffs", "message"),
    [
        ({NAME: item(index_steps=[0, 1, 1])}, r"there are 3 index_steps for 2 values"),
        ({NAME: item(index_steps=[0])}, r"there are 1 index_steps for 2 values"),
        ({NAME: item(index_steps=[0, 3])}, r"lead beyond the 3 elements of shape \[3\]"),
        ({NAME: item(index_steps=[3, 1])}, r"lead beyond the 3 elements"),
        ({NAME: item(index_steps=[2**62, 2**62])}, r"lead beyond the 3 elements"),
        ({NAME: item(index_steps=[0, 0])}, r"in steps of 1 or more"),
        ({NAME: item(index_steps=[-1, 1])}, r"must start at 0 or more"),
        ({NAME: item(index_steps=[2, -1])}, r"in steps of 1 or more"),
        ({NAME: item(index_steps=[0, 1.0])}, r"index_steps must be a list of integers, got a list"),
        ({NAME: item(index_steps=[False, True])}, r"index_steps must be a list of integers"),
        ({NAME: item(index_steps=(0, 1))}, r"index_steps must be a list of integers, got a tuple"),
        ({NAME: item(index_steps=[0, [1]])}, r"index_steps must be a list of integers"),
        ({NAME: item(values=torch.tensor([1.0, float("nan")]))}, r"1 values are NaN or infinite"),
        ({NAME: item(values=torch.tensor([1.0, float("-inf")]))}, r"1 values are NaN or infinite"),
        ({NAME: item(values=torch.tensor([1, 2]))}, r"floating-point numbers, got int64"),
        ({NAME: item(values=[1.0, 2.0])}, r"values must be a tensor, got a list"),
        ({NAME: item(size=[3])}, r"size: a shape must be"),
        ({NAME: item(size=(3.0,))}, r"size: a shape must be"),
        ({NAME: item(size=(2**40, 2**40))}, r"size: a shape must have fewer"),
        ({NAME: item(size=(True,))}, r"size: a shape must be"),
        ({NAME: item(more=1)}, r"must hold \['index_steps', 'size', 'values'\], got \['index_steps', 'more'"),
        ({NAME: {"size": torch.Size([3])}}, r"must hold .*, got \['size'\]"),
        ({NAME: torch.ones(3)}, r"must hold .*, got a StoredTensor"),
        ({5: item()}, r"must hold parameters by name under 'diffs'"),
        ([1], r"must hold parameters by name under 'diffs', got a list"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(tmp_path, diffs, message):
    folder = tmp_path / "sft"
    folder.mkdir()
    torch.save({"diffs": diffs, "abs": {}}, folder / "pytorch_diff.bin")
    refused(folder, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"diffs": {}, "abs": {}, "more": 1}, r"holds 'more', which is not part of this format"),
        ({"weights": {}}, r"holds no 'diffs' and no 'abs'"),
        ([1, 2], r"holds no 'diffs' and no 'abs'"),
        ({"diffs": {}, "abs": {"classifier.weight": 5}}, r"'classifier.weight' must be a tensor, got a int"),
        ({"abs": {"classifier.weight": torch.tensor([float("inf")])}}, r"holds NaN or infinity"),
        ({"diffs": {NAME: item()}, "abs": {NAME: torch.ones(3)}}, r"both as a difference and whole"),
    ],
)
def test_another_content_is_refused(tmp_path, content, message):
    folder = tmp_path / "sft"
    folder.mkdir()
    torch.save(content, folder / "pytorch_diff.bin")
    refused(folder, message)


def test_one_memory_for_many_names_is_refused(tmp_path):
    # A file of a few kilobytes that would become gigabytes.
    folder = tmp_path / "sft"
    folder.mkdir()
    one = torch.ones(1000)
    torch.save({"abs": {f"head.{n}.weight": one for n in range(1000)}}, folder / "pytorch_diff.bin")
    refused(folder, r"'head.1.weight' is held in the memory of .*'head.0.weight'")
    steps = [1] * 1000
    diffs = {f"bert.{n}.weight": item(size=(2000,), index_steps=steps, values=torch.ones(1000)) for n in range(9)}
    torch.save({"diffs": diffs}, folder / "pytorch_diff.bin")
    refused(folder, r"'bert.1.weight' is held in the memory of")


def test_a_sparse_head_does_not_become_dense_by_its_claim_alone(tmp_path):
    folder = tmp_path / "sft"
    folder.mkdir()
    head = {"size": torch.Size([2**20, 2**20]), "index_steps": [5], "values": torch.ones(1)}
    torch.save({"diffs": {}, "abs": {"classifier.weight": head}}, folder / "pytorch_diff.bin")
    refused(folder, r"'classifier.weight' claims 1099511627776 elements and holds 1")


# The container


def bomb(path, *, compression: int, size: int = 30_000_000) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("pytorch_diff/data.pkl", bytes(size))


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    folder = tmp_path / "sft"
    folder.mkdir()
    bomb(folder / "pytorch_diff.bin", compression=zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    refused(folder, r"'pytorch_diff/data.pkl' is compressed or encrypted \(30,000,000 bytes out of [\d,]+\)")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_members_that_claim_more_than_the_file_holds(tmp_path):
    folder = write_diff(tmp_path / "sft", {NAME: torch.eye(3)})
    path = folder / "pytorch_diff.bin"
    raw = bytearray(path.read_bytes())
    entry = raw.rfind(b"PK\x01\x02")
    # Both sizes of the last member, in the table of contents.
    raw[entry + 20 : entry + 28] = struct.pack("<II", 2**31 - 1, 2**31 - 1)
    path.write_bytes(raw)
    refused(folder, r"claims [\d,]+ bytes in a file of [\d,]+\. Nothing was unpacked")


def test_overlapping_members_are_refused(tmp_path):
    folder = write_diff(tmp_path / "sft", {NAME: torch.randn(60, 60)})
    path = folder / "pytorch_diff.bin"
    raw = path.read_bytes()
    # A table of contents that lists the largest member many times, under other names: a quine of a zip bomb.
    start = raw.find(b"PK\x01\x02")
    end = raw.find(b"PK\x05\x06")
    data_entry = raw.find(b"pytorch_diff/data/0", start) - 46
    length = 46 + sum(struct.unpack("<HHH", raw[data_entry + 28 : data_entry + 34]))
    entry = raw[data_entry : data_entry + length]
    more = b"".join(entry.replace(b"data/0", f"dat{n:03}".encode()) for n in range(50))
    table = raw[start:end].split(b"PK\x06\x06")[0] + more
    count = table.count(b"PK\x01\x02")
    tail = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, len(table), start, 0)
    path.write_bytes(raw[:start] + table + tail)
    refused(folder, r"claims [\d,]+ bytes in a file of [\d,]+")


def test_a_member_twice_is_refused(tmp_path):
    folder = write_diff(tmp_path / "sft", {NAME: torch.eye(3)})
    with zipfile.ZipFile(folder / "pytorch_diff.bin", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("pytorch_diff/data.pkl", b"\x80\x02}.")
    refused(folder, r"'pytorch_diff/data.pkl' is there twice")


def test_damage_is_found(tmp_path):
    folder = write_diff(tmp_path / "sft", {NAME: torch.randn(50, 50)})
    path = folder / "pytorch_diff.bin"
    raw = bytearray(path.read_bytes())
    raw[raw.find(b"pytorch_diff/data/0") + 200] ^= 1
    path.write_bytes(raw)
    refused(folder, r"is damaged \(Bad CRC-32")


def test_every_cut_is_refused(tmp_path):
    folder = write_diff(tmp_path / "sft", {NAME: torch.eye(3)}, {"classifier.bias": torch.ones(2)})
    whole = (folder / "pytorch_diff.bin").read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        (folder / "pytorch_diff.bin").write_bytes(whole[:length])
        refused(folder, r"pytorch_diff.bin")


def test_a_changed_byte_is_refused_or_changes_nothing(tmp_path):
    path = write_diff(tmp_path / "sft", {NAME: torch.eye(3)}, {"classifier.bias": torch.ones(2)}) / "pytorch_diff.bin"
    whole = path.read_bytes()
    refusals = 0
    for position in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[position] ^= 0x55
        path.write_bytes(changed)
        try:
            found = read_composable_sft(path, source="it")
        except FormatError:
            refusals += 1
            continue
        # What is left out by a lost member is refused, and what is there is protected by its checksum.
        assert torch.equal(found.deltas[NAME].to_dense(), torch.eye(3))
        assert found.heads["classifier.bias"].tolist() == [1, 1]
    assert refusals > 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"is a pointer of Git LFS"),
        (b"", r"is no file of torch.save"),
        (b"hello", r"is no file of torch.save"),
        (pickle.dumps({"diffs": {}}, 2), r"is no file of torch.save"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    folder = tmp_path / "sft"
    folder.mkdir()
    (folder / "pytorch_diff.bin").write_bytes(content)
    refused(folder, message)


def test_another_kind_of_zip_is_refused(tmp_path):
    folder = tmp_path / "sft"
    folder.mkdir()
    bomb(folder / "pytorch_diff.bin", compression=zipfile.ZIP_STORED, size=10)
    rewritten = folder / "pytorch_diff.bin"
    with zipfile.ZipFile(rewritten, "w") as archive:
        archive.writestr("hello.txt", "hello")
    refused(folder, r"holds no data.pkl, so torch.save did not write it")


def test_a_big_endian_file_is_refused(tmp_path):
    folder = write_diff(tmp_path / "sft", {NAME: torch.eye(3)})
    rewrite(folder / "pytorch_diff.bin", lambda name, old: b"big" if name.endswith("byteorder") else old)
    refused(folder, r"was written on a big-endian machine")


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

"""Files that mean harm, or are damaged: refused by name, nothing executed, nothing left behind."""

from __future__ import annotations

import os
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from peft_sparse import import_adapter
from tests.support.foreign_files import NAME, Calls, pickled, refused, write_pickle


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

"""Archives that mean harm, or are damaged: refused by name, nothing unpacked, nothing left behind."""

from __future__ import annotations

import pickle
import struct
import tracemalloc
import zipfile

import pytest
import torch

from peft_sparse.errors import FormatError
from peft_sparse.importing.composable_sft import read_composable_sft
from tests.support.foreign_files import NAME, refused, rewrite, write_diff

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

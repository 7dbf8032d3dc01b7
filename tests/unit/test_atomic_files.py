"""Files and folders that change in one step, whatever stops the writer, and what a killed writer leaves behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_sparse import files
from peft_sparse.errors import ConfigError
from peft_sparse.files import AtomicFolder, atomic_file, save_tensors, write_atomically

DOORS = ("weights", "config")


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def write(folder: Path, new: dict[str, str], **options) -> None:
    options = {"overwrite": True, "doors": DOORS, "is_replaced": lambda name: name.startswith("part"), **options}
    with AtomicFolder(folder, **options) as atomic:
        for name, text in new.items():
            (atomic.staging / name).write_text(text)


OLD = {"config": "old", "weights": "old", "part1": "old", "part2": "old", "notes": "mine"}
NEW = {"config": "new", "weights": "new", "part1": "new", "part3": "new"}
RESULT = {**NEW, "notes": "mine"}


def filled(folder: Path) -> Path:
    folder.mkdir()
    for name, text in OLD.items():
        (folder / name).write_text(text)
    return folder


def test_a_file_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "file.txt"
    write_atomically(path, b"old")
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.name == path.name
    assert content(tmp_path) == {"file.txt": "new"}


def fail_halfway(path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("on the way")


def test_an_exception_leaves_the_old_file(tmp_path):
    write_atomically(tmp_path / "file", b"old")
    with pytest.raises(RuntimeError, match="on the way"):
        fail_halfway(tmp_path / "file")
    assert content(tmp_path) == {"file": "old"}


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder to write into: '.*/missing'"):
        write_atomically(tmp_path / "missing" / "file", b"")


def test_a_new_folder_appears_whole(tmp_path):
    with AtomicFolder(tmp_path / "out") as atomic:
        (atomic.staging / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert content(tmp_path / "out") == {"a": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_overwritten_folder_keeps_what_is_not_replaced(tmp_path):
    folder = filled(tmp_path / "out")
    write(folder, NEW)
    assert content(folder) == RESULT


def fail_at_move(monkeypatch, number: int) -> None:
    """Let the system refuse the move of this number, counted from 1, and no other."""
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == number:
            raise PermissionError("no")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)


@pytest.mark.parametrize("number", range(1, 9))
def test_a_failing_move_brings_everything_back(tmp_path, monkeypatch, number):
    folder = filled(tmp_path / "out")
    fail_at_move(monkeypatch, number)
    with pytest.raises(PermissionError):
        write(folder, NEW)
    assert content(folder) == OLD


SUB_OLD = {"sub/config": "old", "sub/part1": "old", "sub/notes": "mine", "whole/part1": "old", "whole/notes": "old"}
SUB_NEW = {"config": "new", "sub/config": "new", "sub/part2": "new", "whole/deep/weights": "new", "fresh/a": "new"}
SUB_RESULT = {**SUB_NEW, "sub/notes": "mine"}


def texts(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write_below(folder: Path) -> None:
    replaced = ("whole", "sub/part1")
    with AtomicFolder(folder, overwrite=True, doors=DOORS, is_replaced=lambda name: name in replaced) as atomic:
        for name, text in SUB_NEW.items():
            (atomic.staging / name).parent.mkdir(parents=True, exist_ok=True)
            (atomic.staging / name).write_text(text)


def with_subfolders(folder: Path) -> Path:
    for name, text in SUB_OLD.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_what_others_have_in_subfolders_stays(tmp_path):
    folder = with_subfolders(tmp_path / "out")
    write_below(folder)
    assert texts(folder) == SUB_RESULT


@pytest.mark.parametrize("number", range(1, 9))
def test_a_failing_move_brings_subfolders_back(tmp_path, monkeypatch, number):
    folder = with_subfolders(tmp_path / "out")
    fail_at_move(monkeypatch, number)
    with pytest.raises(PermissionError):
        write_below(folder)
    assert texts(folder) == SUB_OLD
    assert sorted(path.name for path in folder.iterdir()) == ["sub", "whole"]


@pytest.mark.parametrize("name", ["x" * 255, "日" * 85])
def test_names_may_be_as_long_as_the_system_has_them(tmp_path, name):
    for text in ("1", "2"):
        write(tmp_path / name, {"a": text})
        assert content(tmp_path / name) == {"a": text}
    write_atomically(tmp_path / name / name, b"3")
    assert content(tmp_path / name) == {"a": "2", name: "3"}
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch, number):
    def refusing(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refusing)
    write_atomically(tmp_path / "f", b"1")
    write(tmp_path / "out", {"a": "1"})
    with AtomicFolder(tmp_path / "out", overwrite=True) as atomic:
        (atomic.staging / "a").write_text("2")
        with pytest.raises(ConfigError, match=r"another process is writing into .*out: its files are in \.out\."):
            AtomicFolder(tmp_path / "out", overwrite=True)
    assert texts(tmp_path) == {"f": "1", "out/a": "2"}


def test_a_relative_folder_is_where_it_was_when_writing_began(tmp_path, monkeypatch):
    for folder in (tmp_path / "out", tmp_path / "other" / "out"):
        folder.mkdir(parents=True)
    (tmp_path / "other" / "out" / "f").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with AtomicFolder("out") as atomic:
        (atomic.staging / "a").write_text("1")
        monkeypatch.chdir(tmp_path / "other")
    assert texts(tmp_path) == {"out/a": "1", "other/out/f": "mine"}


def test_a_writer_waits_for_another(tmp_path):
    begun, may_end = threading.Event(), threading.Event()

    def first():
        with AtomicFolder(tmp_path / "out") as atomic:
            (atomic.staging / "a").write_text("1")
            begun.set()
            may_end.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait(60)
    with pytest.raises(ConfigError, match="another process"):
        AtomicFolder(tmp_path / "out", wait=0.3)
    threading.Timer(0.3, may_end.set).start()
    write(tmp_path / "out", {"b": "2"}, wait=60)
    thread.join()
    assert content(tmp_path / "out") == {"a": "1", "b": "2"}


def forked(work: Callable[[], object]) -> int:
    """The id of a process that does this and ends; forked, since importing torch anew takes its time."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("number", range(1, 10))
def test_a_kill_between_two_moves_never_mixes_old_and_new(tmp_path, number):
    folder = filled(tmp_path / "out")
    replace, calls = os.replace, []

    def killing(source, target):
        calls.append(source)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    def work():
        os.replace = killing
        write(folder, NEW)

    assert exit_code(forked(work)) == (-signal.SIGKILL if number < 9 else 0)
    if number == 9:
        assert content(folder) == RESULT
        return
    # Closed: without its configuration nobody reads the rest. But for the first move, which did not happen.
    assert (folder / "config").exists() == (number == 1)
    with pytest.raises(ConfigError, match="exists and is not empty"):
        AtomicFolder(folder)
    assert content(folder) == OLD


def test_a_kill_after_the_last_move_leaves_the_new(tmp_path):
    folder = filled(tmp_path / "out")

    def work():
        files.shutil.rmtree = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)
        write(folder, NEW)

    assert exit_code(forked(work)) == -signal.SIGKILL
    with pytest.raises(ConfigError, match="exists and is not empty"):
        AtomicFolder(folder)
    assert content(folder) == RESULT


def test_what_a_dead_writer_left_goes_and_what_a_living_one_has_stays(tmp_path):
    ready, tell = os.pipe()

    def work():
        atomic = AtomicFolder(tmp_path / "out")
        (atomic.staging / "half").write_text("x")
        os.write(tell, b"x")
        time.sleep(600)

    child = forked(work)
    os.read(ready, 1)
    staged = [path.name for path in tmp_path.iterdir()]
    with pytest.raises(ConfigError, match=r"another process is writing into .*out"):
        AtomicFolder(tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == staged
    os.kill(child, signal.SIGKILL)
    assert exit_code(child) == -signal.SIGKILL
    write(tmp_path / "out", {"a": "1"}, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_staging_folder_without_a_lock_goes_once_it_is_old(tmp_path):
    young, old, foreign = (tmp_path / name for name in (".f.0123abcd.staging", ".f.4567abcd.staging", ".f.staging"))
    for folder in (young, old, foreign):
        folder.mkdir()
    os.utime(old, (time.time() - 3600,) * 2)
    write_atomically(tmp_path / "f", b"x")
    assert young.exists()
    assert foreign.exists()
    assert not old.exists()


def save_large(path: Path) -> None:
    with atomic_file(path) as temporary:
        save_tensors({"a": torch.zeros(10_000)}, temporary)


def test_a_full_disk_names_the_file_and_changes_nothing(tmp_path):
    """A limit on the size of files stands for the full disk: safetensors gets the error from the system likewise."""
    write_atomically(tmp_path / "f.safetensors", b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"nothing was written or changed: '.*f\.safetensors'") as found:
            save_large(tmp_path / "f.safetensors")
        with pytest.raises(OSError, match=r"nothing was written or changed: '.*out'"):
            write(tmp_path / "out", {"a": "x" * 20_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert found.value.errno in files._FULL
    assert content(tmp_path) == {"f.safetensors": "old"}


def test_save_tensors_writes_what_safetensors_does(tmp_path):
    save_tensors({"a": torch.arange(3)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.arange(3))
    header = (tmp_path / "a.safetensors").read_bytes()[8:]
    assert json.JSONDecoder().raw_decode(header.decode(errors="ignore"))[0]["__metadata__"] == {"format": "pt"}

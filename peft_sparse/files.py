"""Files and folders that change in one step: whatever stops their writer leaves the old content or the new."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import ConfigError

# Inside a staging folder: held by its writer while that is alive; what is being replaced; which names are old and new.
_LOCK, _OLD, _PLAN = ".lock", ".old", ".plan.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SECONDS_TO_LOCK = 60


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path of the same name: what was written there replaces the file when the block ends.

    An exception leaves the old file. What an earlier writer of the same file left behind when it was killed is removed.

    Args:
        path: the file, in a folder that exists.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: the disk is full; it names the file.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder to write into", os.fspath(target.parent))
    with _full_disk_names(target), _Staging(target.parent, target.name) as staging:
        yield staging.path / target.name
        os.replace(staging.path / target.name, target)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace the content of a file in one step."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written; safetensors' own error for that has no common base with Python's.
    """
    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error


class AtomicFolder:
    """Collects files in a staging folder, and puts all of them in place when its `with` block ends.

    An exception leaves the folder as it was. So does a kill: a new folder appears in one step. In one that exists, the
    files without which none of the others is read (`doors`) go first and come back last, and the next writer finds what
    a killed one has not finished and undoes it.

    Args:
        directory: where the files will be.
        overwrite: replace what is there: files that `is_replaced` says, and those of the same names as new ones.
        what: what is written, for the errors.
        is_replaced: whether a file of this name goes when the new ones come.
        doors: names of files that come last, in this order.

    Attributes:
        directory: as an absolute path.
        staging: where the files are to be written.

    Raises:
        ConfigError: the directory is a file, holds something and `overwrite` was not asked for, or another process is
            writing into it.
        OSError: it cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        what: str = "content",
        is_replaced: Callable[[str], bool] = lambda name: False,
        doors: Sequence[str] = (),
    ) -> None:
        self._given, self._overwrite, self._what = os.fspath(directory), overwrite, what
        self._is_replaced, self._doors = is_replaced, tuple(doors)
        self.directory = Path(directory).resolve()
        check_output(directory, overwrite=overwrite, what=what)
        # Where a rename reaches the directory: inside it if it is there (it may be a mount point), else beside it.
        inside = self.directory.exists()
        self._staging = _Staging(self.directory if inside else self.directory.parent, self.directory.name)
        self._staging.open()
        self.staging = self._staging.path
        if _writers(self.directory) != [self.staging]:
            self._staging.close()
            raise ConfigError(f"another process is writing into {directory}. Wait for it, or give another directory.")

    def __enter__(self) -> AtomicFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with _full_disk_names(self.directory):
                if isinstance(error, OSError):
                    raise error
                if error is None:
                    self._commit()
        finally:
            self._staging.close()

    def _commit(self) -> None:
        if not self.directory.exists():
            (self.staging / _LOCK).unlink(missing_ok=True)
            os.replace(self.staging, self.directory)
            return
        check_output(self._given, overwrite=self._overwrite, what=self._what)  # again: writing took its time
        try:
            self._exchange()
        except BaseException:
            _undo(self.staging, self.directory)
            raise

    def _exchange(self) -> None:
        new = self._in_order(path.name for path in self.staging.iterdir() if path.name != _LOCK)
        there = [path.name for path in self.directory.iterdir() if path != self.staging]
        old = self._in_order(name for name in there if name in new or self._is_replaced(name))
        (self.staging / _OLD).mkdir()
        (self.staging / _PLAN).write_text(json.dumps({"old": old, "new": new}), encoding="utf-8")
        for name in reversed(old):
            os.replace(self.directory / name, self.staging / _OLD / name)
        for name in new:
            os.replace(self.staging / name, self.directory / name)

    def _in_order(self, names: Iterator[str]) -> list[str]:
        return sorted(names, key=lambda name: (self._doors.index(name) if name in self._doors else -1, name))


def check_output(directory: str | os.PathLike[str], *, overwrite: bool, what: str = "content") -> None:
    """Refuse a directory that holds something, unless it is to be overwritten; clear up after killed writers first.

    Raises:
        ConfigError: it does, or it is a file, or begins with ~.
    """
    if os.fspath(directory).startswith("~"):
        raise ConfigError(f"{directory} begins with ~, which stands for a home only in a shell. Give the whole path.")
    path = Path(directory).resolve()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{directory} is a file, not a directory. Give another output directory.")
    writers = _writers(path)
    if not overwrite and path.is_dir() and any(inside not in writers for inside in path.iterdir()):
        raise ConfigError(
            f"{directory} exists and is not empty. Give another output directory, or replace the {what} in it with "
            "overwrite=True (--overwrite)."
        )


def check_apart(output: str | os.PathLike[str], **inputs: str | os.PathLike[str] | None) -> None:
    """Refuse to write into a folder that is read: what is in it would be lost, or taken for a part of the result.

    Args:
        output: where something is to be written.
        inputs: {what it is: folder, file or Hub id}; with an underscore for a blank.

    Raises:
        ConfigError: the output is one of them.
    """
    place = Path(output).resolve()
    for name, given in inputs.items():
        path = Path(given if given is not None else "").expanduser().resolve()
        if given is not None and path.exists() and place in (path, *([path.parent] if path.is_file() else [])):
            what = name.replace("_", " ")
            raise ConfigError(f"the output {os.fspath(output)!r} is the {what} itself. Give another directory.")


class _Staging:
    """A hidden folder that lives as long as its writer; the lock in it tells other processes whether that is alive."""

    def __init__(self, parent: Path, name: str) -> None:
        self._parent, self._name = parent, name
        self.path = parent / f".{name}.{uuid.uuid4().hex[:8]}.staging"
        self._lock = FileLock(self.path / _LOCK)

    def open(self) -> None:
        _living(self._parent, self._name, None)
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(self._parent)) from error
        try:
            self._lock.acquire(timeout=_SECONDS_TO_LOCK)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._lock.release()
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> _Staging:
        self.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _writers(directory: Path) -> list[Path]:
    """The staging folders of living writers of a folder; those of killed ones are undone and removed."""
    beside = _living(directory.parent, directory.name, directory)
    return beside + (_living(directory, directory.name, directory) if directory.is_dir() else [])


def _living(parent: Path, name: str, directory: Path | None) -> list[Path]:
    """Staging folders in `parent` whose writers are alive; the others go."""
    pattern = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.staging")
    try:
        found = [path for path in parent.iterdir() if pattern.fullmatch(path.name)]
    except OSError:  # not there yet, or nobody may look: then it cannot be cleared up either
        return []
    return [path for path in sorted(found) if not _remove_if_abandoned(path, directory)]


def _remove_if_abandoned(staging: Path, directory: Path | None) -> bool:
    try:
        if not (staging / _LOCK).exists():
            # Its writer is about to lock it, or was killed on the way to that, or while removing it.
            if not staging.exists() or time.time() - staging.stat().st_mtime < _SECONDS_TO_LOCK:
                return not staging.exists()
            shutil.rmtree(staging)
            return True
        with FileLock(staging / _LOCK).acquire(timeout=0):
            if directory is not None:
                _undo(staging, directory)
            shutil.rmtree(staging)
    except (OSError, Timeout):  # alive; or not ours to remove
        return False
    return True


def _undo(staging: Path, directory: Path) -> None:
    """Bring back what an exchange took away, if it was not finished."""
    try:
        plan = json.loads((staging / _PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it had not begun
        return
    if not any((staging / name).exists() for name in plan["new"]):
        return
    for name in reversed(plan["new"]):
        if not (staging / name).exists():
            os.replace(directory / name, staging / name)
    for name in plan["old"]:
        if (staging / _OLD / name).exists():
            os.replace(staging / _OLD / name, directory / name)


@contextmanager
def _full_disk_names(target: Path) -> Iterator[None]:
    """Let the error of a full disk name what was to be written, not a temporary name."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.errno not in _FULL:
            raise
        text = f"{os.strerror(error.errno)}, and so nothing was written or changed"
        raise OSError(error.errno, text, os.fspath(target)) from error

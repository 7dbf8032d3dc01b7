"""Files and folders that change in one step: whatever stops their writer leaves the old content or the new."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import TracebackType

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import ConfigError

# Inside a staging folder: held by its writer while that is alive; what is being replaced; which names are old and new.
_LOCK, _OLD, _PLAN = ".lock", ".old", ".plan.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SECONDS_TO_LOCK = 60
# File systems without locks: NFS whose lock daemon is off, some in user space.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
# File systems take 255, and the name of a staging folder is 18 longer than that of what is written.
_MOST_NAME_BYTES = 200
# Its own: waiting must not move the numbers that a training run draws.
_jitter = random.Random()


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


@contextmanager
def one_writer(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around writing what becomes a file bit by bit, beside it: no other process does so for the same file.

    Args:
        path: the file, in a folder that exists.

    Raises:
        ConfigError: another process does.
    """
    target = Path(path)
    with _Staging(target.parent, target.name) as staging:
        if _living(target.parent, target.name, None) != [staging.path]:
            raise ConfigError(f"another process is writing {path}. Wait for it, or name another file.")
        yield


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written; safetensors' own error for that has no common base with Python's.
    """
    with told_as_os_error(path):
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))


@contextmanager
def told_as_os_error(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around safetensors' writing: what the system refuses is an OSError that names `path`."""
    try:
        yield
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
        overwrite: replace what is there: what `is_replaced` says, and files of the same names as new ones. Others stay,
            in subfolders too.
        what: what is written, for the errors.
        is_replaced: whether a file or folder of this name goes when the new files come. It is asked of what lies in the
            folders that these come into, by paths such as "name" and "sub/name".
        doors: names of files that come last, in this order, in whichever of these folders.
        wait: for how many seconds another process may go on writing into the directory.

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
        wait: float = 0,
    ) -> None:
        self._overwrite, self._what = overwrite, what
        self._is_replaced, self._doors = is_replaced, tuple(doors)
        self.directory = Path(directory).resolve()
        check_output(directory, overwrite=overwrite, what=what)
        end = time.monotonic() + wait
        while others := self._open_beside():
            if time.monotonic() > end:
                raise ConfigError(
                    f"another process is writing into {directory}: its files are in {others[0].name} so far. Wait for "
                    "it, or give another directory. If it was killed, on another machine, delete what it left."
                )
            # Not in step with the other, which may do the same.
            time.sleep(_jitter.uniform(0.02, 0.2))

    def _open_beside(self) -> list[Path]:
        """Open a staging folder, unless another process has one for the same directory: then return the others'."""
        # Where a rename reaches the directory: inside it if it is there (it may be a mount point), else beside it.
        inside = self.directory.exists()
        self._staging = _Staging(self.directory if inside else self.directory.parent, self.directory.name)
        self._staging.open()
        self.staging = self._staging.path
        others = [path for path in _writers(self.directory) if path != self.staging]
        if others:
            self._staging.close()
        return others

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
        check_output(self.directory, overwrite=self._overwrite, what=self._what)  # again: writing took its time
        try:
            self._exchange()
        except BaseException:
            _undo(self.staging, self.directory)
            raise

    def _exchange(self) -> None:
        new = self._in_order(_files_in(self.staging) - {_LOCK})
        old = self._in_order(self._going(set(new)))
        (self.staging / _OLD).mkdir()
        (self.staging / _PLAN).write_text(json.dumps({"old": old, "new": new}), encoding="utf-8")
        for name in reversed(old):
            _move(self.directory / name, self.staging / _OLD / name)
        for name in new:
            _move(self.staging / name, self.directory / name)

    def _going(self, new: set[str]) -> set[str]:
        """What goes when these files come."""
        folders = {PurePosixPath(name).parent for name in new} | {PurePosixPath()}
        there = {(folder / path.name).as_posix() for folder in folders for path in _inside(self.directory / folder)}
        going = {name for name in there - {self.staging.name} if name in new or self._is_replaced(name)}
        # What lies in a folder that goes, goes with it.
        return {name for name in going if not any(str(above) in going for above in PurePosixPath(name).parents)}

    def _in_order(self, names: Iterable[str]) -> list[str]:
        def place(path: str) -> tuple[int, str]:
            name = PurePosixPath(path).name
            return self._doors.index(name) if name in self._doors else -1, path

        return sorted(names, key=place)


def _files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def check_output(directory: str | os.PathLike[str], *, overwrite: bool, what: str = "content") -> None:
    """Refuse a directory that holds something, unless it is to be overwritten; clear up after killed writers first.

    Raises:
        ConfigError: it does, or it is a file, or begins with ~.
    """
    refuse_home(directory)
    path = Path(directory).resolve()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{directory} is a file, not a directory. Give another output directory.")
    writers = _writers(path)
    if not overwrite and path.is_dir() and any(inside not in writers for inside in path.iterdir()):
        raise ConfigError(
            f"{directory} exists and is not empty. Give another output directory, or replace the {what} in it with "
            "overwrite=True (--overwrite)."
        )


def refuse_home(path: str | os.PathLike[str]) -> None:
    """Refuse an output that would become a folder of the name ~.

    Raises:
        ConfigError: it begins with ~.
    """
    if os.fspath(path).startswith("~"):
        raise ConfigError(f"{path} begins with ~, which stands for a home only in a shell. Give the whole path.")


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
        self.path = parent / f".{_short(name)}.{uuid.uuid4().hex[:8]}.staging"
        self._lock: BaseFileLock = FileLock(self.path / _LOCK)

    def open(self) -> None:
        _living(self._parent, self._name, None)
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(self._parent)) from error
        try:
            self._acquire()
        except BaseException:
            self.close()
            raise

    def _acquire(self) -> None:
        try:
            self._lock.acquire(timeout=_SECONDS_TO_LOCK)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            # A file that is there says as much, but not that its writer was killed. Nobody else has made one here.
            (self.path / _LOCK).unlink(missing_ok=True)
            self._lock = SoftFileLock(self.path / _LOCK)
            self._lock.acquire(timeout=_SECONDS_TO_LOCK)

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
    pattern = re.compile(rf"\.{re.escape(_short(name))}\.[0-9a-f]{{8}}\.staging")
    try:
        found = [path for path in parent.iterdir() if pattern.fullmatch(path.name)]
    except OSError:  # not there yet, or nobody may look: then it cannot be cleared up either
        return []
    return [path for path in sorted(found) if not _remove_if_abandoned(path, directory)]


def _short(name: str) -> str:
    """A name, or what stands for a long one that something is to be added to."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= _MOST_NAME_BYTES else hashlib.sha256(encoded).hexdigest()


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
            _move(directory / name, staging / name)
    # Folders that were made for them, the innermost first.
    for folder in sorted({above for name in plan["new"] for above in PurePosixPath(name).parents[:-1]}, reverse=True):
        with suppress(OSError):  # something else is in it
            (directory / folder).rmdir()
    for name in plan["old"]:
        if (staging / _OLD / name).exists():
            _move(staging / _OLD / name, directory / name)


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

"""What everything that reads files of somebody else's shares: what a damaged one raises, and claims checked first."""

from __future__ import annotations

import os
import pickle  # the name of an exception only: nothing is unpickled here
import stat
import struct
import zipfile
import zlib
from pathlib import Path

from safetensors import SafetensorError

from .errors import FormatError

# What reading a damaged or hostile file raises, from the parsers and the allocator: all of it means the file.
UNREADABLE: tuple[type[Exception], ...] = (
    SafetensorError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def check_regular(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> None:
    """Refuse what is not a file with an end: opening a pipe or reading a device would never return.

    Args:
        path: the file; one that is not there is left to the code that opens it.
        max_bytes: the size that a file of its kind may have.

    Raises:
        FormatError: it is a folder, a pipe, a device or a socket, or too large.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise FormatError(f"{os.fspath(path)!r} cannot be read: {error}.") from error
    if not stat.S_ISREG(found.st_mode):
        what = "folder" if stat.S_ISDIR(found.st_mode) else "pipe, a device or a socket"
        raise FormatError(f"{os.fspath(path)} must be a file, it is a {what}.")
    if max_bytes is not None and found.st_size > max_bytes:
        raise FormatError(
            f"{os.fspath(path)} has {found.st_size} bytes, more than the {max_bytes} that a file of its kind may have."
        )


def unpacked_bytes(path: str | os.PathLike[str]) -> dict[str, int]:
    """{member of a zip archive: the bytes that it claims to unpack to}; nothing is unpacked.

    Raises:
        FormatError: its members overlap, or two share a name.
        zipfile.BadZipFile: it is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if sum(entry.compress_size for entry in entries) > Path(path).stat().st_size:
        raise FormatError(f"{Path(path)} is a zip archive whose members overlap, and is not opened.")
    if len({entry.filename for entry in entries}) < len(entries):
        raise FormatError(f"{Path(path)} is a zip archive with two members of one name, and is not opened.")
    return {entry.filename: entry.file_size for entry in entries}

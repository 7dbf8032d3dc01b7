"""Files that `torch.save` wrote, read without torch's help: the pickle as data, the tensors straight from the zip."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError
from .restricted_pickle import NumpyDtype, OrderedDict, Unpickler

_LFS = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"
_OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_OLD_VERSION = 1001
_PICKLE = "/data.pkl"
# What torch calls a tensor's memory: ("storage", its type, its name in the file, a device, number of elements).
_IDENTIFIER = [str, torch.dtype, str, str, int]
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class _Storage:
    """A tensor's memory, in the file."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that still lies in its file.

    Attributes:
        dtype, shape: of the tensor.
    """

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def numel(self) -> int:
        """Number of its elements."""
        return prod(self.shape)


class TorchFile:
    """A file of `torch.save`, checked against its own size before anything of it is believed.

    Args:
        path: the file, in the zip format or that of torch before 1.6.

    Attributes:
        content: the saved value; tensors in it are `StoredTensor`.
        source: the path, as text.

    Raises:
        FormatError: it is no such file, is compressed or damaged, or holds what no such file holds.

    Cost: reads the pickle; tensors are read when they are asked for.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.source = os.fspath(path)
        self._storages: dict[str, Tensor] = {}
        self._raw: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        if _is_old_format(self.source):
            self.content = self._load_old(Path(path).read_bytes())
        else:
            self.content = self._load_zip(os.path.getsize(path))

    def _load_zip(self, file_size: int) -> Any:
        with self._zip() as archive:
            self._sizes = _checked_members(archive, file_size, self.source)
            pickles = [name for name in self._sizes if name.endswith(_PICKLE) and name.count("/") == 1]
            if len(pickles) != 1:
                raise self.error("holds no data.pkl, so torch.save did not write it")
            self._root = pickles[0].removesuffix(_PICKLE)
            order = f"{self._root}/byteorder"
            if order in self._sizes and self._read(archive, order) != b"little":
                raise self.error("was written on a big-endian machine. Save it again on a common one")
            pickled = self._read(archive, pickles[0])
        unpickler = Unpickler(pickled, names=_NAMES, persistent=self._storage_in_zip, source=self.source)
        content = unpickler.load()
        if unpickler.position != len(pickled):
            raise self.error("goes on after its pickle has ended")
        return content

    def _load_old(self, data: bytes) -> Any:
        """The format before torch 1.6: four pickles, and then each memory, its number of elements before it."""
        claimed: dict[str, _Storage] = {}

        def storage_of(identifier: Any) -> _Storage:
            has_view = isinstance(identifier, tuple) and len(identifier) == 6 and identifier[5] is None
            storage = self._checked(identifier[:5] if has_view else identifier)
            if claimed.setdefault(storage.key, storage) != storage:
                raise self.error(f"claims two sizes for the memory {storage.key!r:.50} of a tensor")
            return storage

        unpickler = Unpickler(data, names=_NAMES, persistent=storage_of, source=self.source, position=len(_OLD_FORMAT))
        version, system = unpickler.load(), unpickler.load()
        if version != _OLD_VERSION or not isinstance(system, dict) or system.get("little_endian") is not True:
            raise self.error("was written by another version of torch, or on a big-endian machine")
        content, keys = unpickler.load(), unpickler.load()
        if not isinstance(keys, list) or any(not isinstance(key, str) for key in keys) or set(keys) != claimed.keys():
            raise self.error("lists other memories than its tensors lie in")
        position = unpickler.position
        for key in keys:
            start, size = position + 8, claimed[key].count * claimed[key].dtype.itemsize
            count, raw = int.from_bytes(data[position:start], "little"), data[start : start + size]
            if count != claimed[key].count or len(raw) < size:
                raise self.error(
                    f"claims {claimed[key].count} elements of {claimed[key].dtype} and holds {len(raw)} bytes"
                )
            self._raw[key], self._sizes[key] = raw, size
            position = start + size
        if position != len(data) or len(self._raw) != len(keys):
            raise self.error("goes on after its tensors have ended")
        return content

    def error(self, what: str) -> FormatError:
        """An error about the file."""
        return FormatError(f"{self.source} {what}. Nothing was read. Get the file again from who made it.")

    def tensor(self, stored: StoredTensor) -> Tensor:
        """A tensor of the file, in memory of its own.

        Raises:
            FormatError: its memory is not in the file, or smaller than the tensor.
        """
        whole = self._whole(stored.storage)
        with_stride = zip(stored.shape, stored.stride, strict=True)
        last = stored.offset + sum((length - 1) * step for length, step in with_stride) if stored.numel else 0
        # A stride of 0 lets one number stand for any many.
        if stored.numel > whole.numel() or last >= max(whole.numel(), 1):
            raise self.error(f"holds a tensor of {stored.numel} elements in a memory of {whole.numel()}")
        if stored.numel == 0:
            return torch.empty(stored.shape, dtype=stored.dtype)
        strided = whole.as_strided(stored.shape, stored.stride, stored.offset)
        if stored.numel == whole.numel() and strided.is_contiguous():
            del self._storages[stored.storage.key]  # it is all there is of this memory, and needs no copy
            return strided
        return strided.clone(memory_format=torch.contiguous_format)

    def tensors(self) -> dict[str, Tensor]:
        """The content, which must be {name: tensor}.

        Raises:
            FormatError: it is something else, or the tensors are more than the file holds.
        """
        if not isinstance(self.content, dict):
            raise self.error(f"holds a {type(self.content).__name__}, not a dictionary of tensors")
        for name, stored in self.content.items():
            if not isinstance(name, str) or not isinstance(stored, StoredTensor):
                raise self.error(f"holds {name!r:.100}, which is no tensor")
        self.check_total(self.content)
        return {name: self.tensor(stored) for name, stored in self.content.items()}

    def check_total(self, stored: Mapping[str, StoredTensor]) -> None:
        """Refuse tensors that are together larger than the file: many that share one memory.

        Raises:
            FormatError: they are.
        """
        claimed = sum(tensor.numel * tensor.dtype.itemsize for tensor in stored.values())
        there = sum(self._sizes.values())
        if claimed > there:
            raise self.error(f"claims {claimed:,} bytes of tensors and holds {there:,}")

    def _zip(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.source)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError) as error:
            raise self.error(f"is a damaged zip file ({error})") from error

    def _read(self, archive: zipfile.ZipFile, member: str) -> bytes:
        try:
            return archive.read(member)
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
            raise self.error(f"is damaged ({error})") from error

    def _checked(self, identifier: Any) -> _Storage:
        if not isinstance(identifier, tuple) or [type(part) for part in identifier] != _IDENTIFIER:
            raise self.error("names a tensor's memory in a way that torch does not")
        _kind, dtype, key, _location, count = identifier
        if count < 0:
            raise self.error(f"claims {count} elements of {dtype}")
        return _Storage(key, dtype, count)

    def _storage_in_zip(self, identifier: Any) -> _Storage:
        storage = self._checked(identifier)
        size = self._sizes.get(f"{self._root}/data/{storage.key}")
        if size is None:
            raise self.error(f"lacks the memory {storage.key!r:.50} of a tensor")
        if storage.count * storage.dtype.itemsize != size:
            raise self.error(f"claims {storage.count} elements of {storage.dtype} in {size} bytes")
        return storage

    def _whole(self, storage: _Storage) -> Tensor:
        if storage.key not in self._storages:
            if storage.key in self._raw:
                raw = bytearray(self._raw[storage.key])
            else:
                with self._zip() as archive:
                    raw = bytearray(self._read(archive, f"{self._root}/data/{storage.key}"))
            self._storages[storage.key] = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0)
        whole = self._storages[storage.key]
        return whole.view(storage.dtype) if whole.numel() else torch.empty(0, dtype=storage.dtype)


def _is_old_format(source: str) -> bool:
    """Whether a file is in the format before torch 1.6; else it is a zip archive."""
    with open(source, "rb") as file:
        start = file.read(len(_LFS))
    if start.startswith(_LFS):
        raise FormatError(f"{source} is a pointer of Git LFS, not the file itself. Fetch it: git lfs pull")
    if not start.startswith((_ZIP, _OLD_FORMAT)):
        raise FormatError(f"{source} is no file of torch.save: it is no zip archive. Get it again from who made it.")
    return start.startswith(_OLD_FORMAT)


def _checked_members(archive: zipfile.ZipFile, file_size: int, source: str) -> dict[str, int]:
    """{name: size} of the members, which must be stored as they are and fit into the file."""
    members: dict[str, int] = {}
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise FormatError(
                f"{source}: {entry.filename!r:.100} is compressed or encrypted ({entry.file_size:,} bytes out of "
                f"{entry.compress_size:,}), which torch.save never does. Nothing was unpacked."
            )
        if entry.filename in members:
            raise FormatError(f"{source}: {entry.filename!r:.100} is there twice. Nothing was unpacked.")
        members[entry.filename] = entry.file_size
    if sum(members.values()) > file_size:
        raise FormatError(
            f"{source} claims {sum(members.values()):,} bytes in a file of {file_size:,}. Nothing was unpacked."
        )
    return members


# Names in the pickle


def checked_shape(sizes: Any) -> tuple[int, ...]:
    """A shape that was unpickled.

    Raises:
        FormatError: it is none, or of more elements than any model has.
    """
    if not isinstance(sizes, tuple) or len(sizes) > 16 or any(type(size) is not int or size < 0 for size in sizes):
        raise FormatError("a shape must be at most 16 numbers >= 0")
    if prod(sizes) >= 2**48:
        raise FormatError(f"a shape must have fewer than 2**48 elements, got {list(sizes)}")
    return sizes


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0 or not 4 < len(arguments) < 8:
        raise FormatError("it makes a tensor out of a memory")
    if len(checked_shape(shape)) != len(checked_shape(stride)):
        raise FormatError("a stride for each dimension is needed")
    return StoredTensor(storage, offset, shape, stride)


def _parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    if not isinstance(arguments[0], StoredTensor):
        raise FormatError("a parameter is a tensor")
    return arguments[0]


def _ordered_dict(arguments: tuple[Any, ...]) -> OrderedDict:
    if arguments:
        raise FormatError("dictionaries are filled afterwards")
    return OrderedDict()


def _numpy_dtype(arguments: tuple[Any, ...]) -> NumpyDtype:
    code = arguments[0]
    if code not in [f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)]:
        raise FormatError(f"only integers are part of this format, got {code!r:.20}")
    return NumpyDtype(code)


def _numpy_scalar(arguments: tuple[Any, ...]) -> int:
    dtype, raw = arguments
    if not isinstance(dtype, NumpyDtype) or not isinstance(raw, bytes) or len(raw) != int(dtype.code[1:]):
        raise FormatError("a number must have the bytes of its dtype")
    return int.from_bytes(raw, "little", signed=dtype.code[0] == "i")


def _encode(arguments: tuple[Any, ...]) -> bytes:
    text, encoding = arguments
    if not isinstance(text, str) or encoding != "latin1" or len(text) > 8:
        raise FormatError("only the bytes of a number are part of this format")
    return text.encode("latin1")


_NAMES: dict[tuple[str, str], Any] = {
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    ("torch", "Size"): lambda arguments: checked_shape(*arguments),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): _ordered_dict,
    ("numpy", "dtype"): _numpy_dtype,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
    ("_codecs", "encode"): _encode,
}

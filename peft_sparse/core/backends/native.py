"""Kernels in C++ for processors, where a compiler is at hand; everything works without them, at torch's speed.

`native_kernels.cpp` is compiled once for each version of it, of torch and of the compiler's machine, into a folder that
belongs to the user and that nobody else can write into. It is a plain shared library without torch's headers: what it
gets are addresses. `PEFT_SPARSE_NATIVE=0` in the environment turns it off.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import threading
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...files import atomic_file

logger = logging.getLogger(__name__)

SWITCH = "PEFT_SPARSE_NATIVE"
_SOURCE = Path(__file__).with_name("native_kernels.cpp")
# Products may be contracted; nothing is assumed about NaN and infinity.
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math")
_SECONDS_TO_COMPILE = 300
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_SIGNATURES = {
    "best_level": ("", "i"),
    "tile": ("", "n"),
    "pack": ("ipnnnpi", None),
    "sampled": ("ipnnipnninpinpni", None),
    "add_product": ("ppnppp", None),
    "bring_up_to_date": ("ippinpp", "n"),
    "unchanged": ("ppp", "i"),
    "keep_and_write": ("np", "i"),
    "write_back": ("np", None),
    "cover": ("np", "n"),
    "above": ("pnfnpip", "n"),
    "take": ("ippinp", None),
    "put": ("ippinp", None),
    "merge": ("nppipppp", "n"),
}
_C_TYPES = {"f": ctypes.c_float, "i": ctypes.c_int, "n": ctypes.c_int64, "p": ctypes.c_void_p}
# A weight's memory, positions in it, what is kept of it there, and what is added.
Piece = tuple[Tensor, Tensor, Tensor, Tensor | None]
# Gradients, accumulators of rows and columns, indices, and where estimates go.
Cover = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


class Kernels:
    """The compiled library.

    Args:
        path: of the shared library.

    Attributes:
        level: the instruction set that is used: 0 portable, 1 AVX2, 2 AVX-512; the best that the processor has.

    Raises:
        OSError: it is not a library for this machine.
        AttributeError: it is not this library.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(os.fspath(path))
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(library, f"peft_sparse_{name}")
            function.argtypes = [_C_TYPES[letter] for letter in arguments]
            function.restype = None if result is None else _C_TYPES[result]
            setattr(self, f"_{name}", function)
        self.level: int = library.peft_sparse_best_level()
        self._tile_rows: int = library.peft_sparse_tile()

    def pack(self, matrix: Tensor) -> Tensor:
        """[tiles * C * rows of a tile] float32 or wider: a factor [N, C] in the form that `sampled` computes with."""
        matrix = _in_rows(matrix)
        rows, columns = matrix.shape
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        packed = torch.empty(-(-rows // self._tile_rows) * columns * self._tile_rows, dtype=dtype)
        arguments = matrix.data_ptr(), matrix.stride(0), rows, columns, packed.data_ptr(), self.level
        self._pack(TYPES[matrix.dtype], *arguments)  # type: ignore[attr-defined]
        return packed

    def sampled(
        self,
        left: Tensor,
        right: Tensor,
        supports: list[Tensor],
        *,
        packed_left: Tensor | None = None,
        packed_right: Tensor | None = None,
    ) -> list[Tensor]:
        """Entries of `left.T @ right` at flat positions.

        Args:
            left: [N, R] float32, float64 or bfloat16.
            right: [N, C], same dtype.
            supports: each [k_i] sorted and unique positions in [R, C].
            packed_left, packed_right: what `pack` made of them, if it was called already.

        Returns:
            one [k_i] tensor per support, float32 (float64 if the factors are).
        """
        left, right = _in_rows(left), _in_rows(right)
        if len(supports) > 1:
            packed_left = self.pack(left) if packed_left is None else packed_left
            packed_right = self.pack(right) if packed_right is None else packed_right
        factors: list[int] = []
        for factor, packed in ((left, packed_left), (right, packed_right)):
            factors += [(factor if packed is None else packed).data_ptr(), factor.stride(0), factor.shape[1]]
            factors.append(int(packed is not None))
        dtype = torch.promote_types(left.dtype, torch.float32)
        threads = torch.get_num_threads()
        found = []
        for support in supports:
            support, entries = support.contiguous(), torch.empty(support.numel(), dtype=dtype)
            wide = int(support.dtype == torch.int64)
            where = support.data_ptr(), wide, support.numel(), entries.data_ptr()
            self._sampled(  # type: ignore[attr-defined]
                TYPES[left.dtype], *factors, left.shape[0], *where, threads, self.level
            )
            found.append(entries)
        return found

    def bring_up_to_date_(self, flat: Tensor, indices: Tensor, originals: Tensor, values: Tensor) -> int:
        """Write `originals + values` where there is something else; returns in how many places.

        Args:
            flat: [numel] contiguous, float32 or bfloat16.
            indices: [k] unique positions in it.
            originals: [k] in the dtype of `flat`.
            values: [k] float32.
        """
        changed: int = self._bring_up_to_date(  # type: ignore[attr-defined]
            TYPES[flat.dtype],
            flat.data_ptr(),
            indices.data_ptr(),
            int(indices.dtype == torch.int64),
            indices.numel(),
            originals.data_ptr(),
            values.data_ptr(),
        )
        return changed

    def take(self, flat: Tensor, indices: Tensor) -> Tensor:
        """[k] `flat[indices]`."""
        found = torch.empty(indices.numel(), dtype=flat.dtype)
        self._move("take", flat, indices, found)
        return found

    def put_(self, flat: Tensor, indices: Tensor, entries: Tensor) -> None:
        """`flat[indices] = entries`, in the dtype of `flat`."""
        self._move("put", flat, indices, entries)

    def _move(self, which: str, flat: Tensor, indices: Tensor, entries: Tensor) -> None:
        where = indices.data_ptr(), int(indices.dtype == torch.int64), indices.numel(), entries.data_ptr()
        getattr(self, f"_{which}")(flat.element_size(), flat.data_ptr(), *where)

    def keep_and_write_(self, pieces: Sequence[Piece]) -> bool:
        """Keep what is in weights and write it with values added, all in one pass; returns whether that is finite.

        Args:
            pieces: (flat, indices, originals, values) of each weight: [numel] float32 or bfloat16; [k] sorted, unique
                positions in it; [k] in the dtype of `flat`, where its entries are kept; [k] float32, rounded once with
                the entry that they are added to. All are contiguous, and no memory is in two of them.
        """
        table = _addresses(pieces)
        return bool(self._keep_and_write(len(pieces), table.buffer_info()[0]))  # type: ignore[attr-defined]

    def write_back_(self, pieces: Sequence[Piece]) -> None:
        """Write what `keep_and_write_` kept; its values are not read, and may be None."""
        table = _addresses(pieces)
        self._write_back(len(pieces), table.buffer_info()[0])  # type: ignore[attr-defined]

    def cover_(self, covers: Sequence[Cover]) -> int:
        """Bring accumulators of matrices up to date with gradients of some entries, see `optim.sm3.accumulate`.

        Args:
            covers: (gradients [k], accumulators of the rows [O] and of the columns [I], indices [k], estimates [k] to
                be filled or None) of each matrix: contiguous, float32 but for the indices.

        Returns:
            how many were brought up to date: all of them, or those before the first with an index beyond its matrix or
            with a NaN.
        """
        table: list[int] = []
        for gradients, rows, columns, indices, estimates in covers:
            table += (gradients.data_ptr(), rows.data_ptr(), rows.numel(), columns.data_ptr(), columns.numel())
            found = 0 if estimates is None else estimates.data_ptr()
            table += (indices.data_ptr(), indices.numel(), found, indices.dtype is torch.int64)
        packed = array("q", table)
        return int(self._cover(len(covers), packed.buffer_info()[0]))  # type: ignore[attr-defined]

    def above(
        self, scores: Tensor, threshold: float, *, at_most: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """Positions and values of the scores that reach a threshold, in their order; None if they are too many.

        Args:
            scores: contiguous float32.
            threshold: a number of float32.
            at_most: how many they may be.
            dtype: of the positions, int32 or int64.

        Raises:
            ValueError: a score is NaN.
        """
        most = min(at_most, scores.numel())
        positions, values = torch.empty(most, dtype=dtype), torch.empty(most)
        places = positions.data_ptr(), int(dtype is torch.int64), values.data_ptr()
        found: int = self._above(scores.data_ptr(), scores.numel(), threshold, most, *places)  # type: ignore[attr-defined]
        if found < 0:
            raise ValueError("a score is NaN")
        return None if found > most else (positions[:found].clone(), values[:found].clone())

    def merge(
        self, supports: list[Tensor], values: list[Tensor] | None = None, factors: list[float] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The union of sorted supports, and the sums of factor * value at its places.

        Args:
            supports: each [k_i] sorted and unique, contiguous, of one dtype; a few: each place looks at all.
            values: each [k_i] float32, contiguous; only the union is wanted if None.
            factors: one for each.

        Returns:
            [u] the union; [u] float32, the float64 sums from the least summand to the greatest, rounded once.
        """
        num = len(supports)
        total = sum(support.numel() for support in supports)
        united = torch.empty(total, dtype=supports[0].dtype)
        sums = None if values is None else torch.empty(total)
        addresses = ctypes.c_void_p * num
        length: int = self._merge(  # type: ignore[attr-defined]
            num,
            addresses(*[support.data_ptr() for support in supports]),
            (ctypes.c_int64 * num)(*[support.numel() for support in supports]),
            int(united.dtype == torch.int64),
            None if values is None else addresses(*[value.data_ptr() for value in values]),
            None if factors is None else (ctypes.c_double * num)(*factors),
            united.data_ptr(),
            None if sums is None else sums.data_ptr(),
        )
        return united[:length].clone(), None if sums is None else sums[:length].clone()


def _addresses(pieces: Sequence[Piece]) -> array[int]:
    """The table of pieces that the kernels read."""
    table: list[int] = []
    for flat, indices, originals, values in pieces:
        table += (
            *(flat.data_ptr(), indices.data_ptr(), indices.numel(), originals.data_ptr()),
            *(0 if values is None else values.data_ptr(), TYPES[flat.dtype], indices.dtype is torch.int64),
        )
    return array("q", table)


def _in_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


_PLAIN = (Tensor, torch.nn.Parameter)
_found: list[Kernels | None] = []
_lock = threading.Lock()


def kernels(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = tuple(TYPES)) -> Kernels | None:
    """The kernels, if they can be had and take these tensors: plain ones on the CPU, seen by nobody else.

    Cost: the first call may compile them, some ten seconds once per machine.
    """
    for tensor in tensors:
        if type(tensor) not in _PLAIN or tensor.device.type != "cpu" or tensor.dtype not in dtypes:
            return None
    if torch._C._len_torch_dispatch_stack():
        return None
    return compiled()


def compiled() -> Kernels | None:
    """The kernels; None if there is no compiler, or `PEFT_SPARSE_NATIVE=0`."""
    if not _found:
        with _lock:
            if not _found:
                _found.append(None if os.environ.get(SWITCH, "1") == "0" else _load())
    return _found[0]


def _load() -> Kernels | None:
    compiler = _compiler()
    if compiler is None:
        logger.info("no C++ compiler was found (CXX, c++, g++, clang++): torch computes what kernels would.")
        return None
    try:
        path = _folder() / f"kernels-{_digest(compiler)}.so"
        if not _is_ours(path, is_folder=False):
            _compile(compiler, path)
        return Kernels(path)
    except (OSError, AttributeError, RuntimeError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
        logger.warning(
            "the kernels could not be compiled or loaded (%s), so torch computes what they would, more slowly. %s=0 in "
            "the environment leaves them out without this warning.",
            f"{error}: {said[-500:]}" if said else error,
            SWITCH,
        )
        return None


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    candidates = [named] if named else ["c++", "g++", "clang++"]
    return next((path for name in candidates if (path := shutil.which(name)) is not None), None)


def _digest(compiler: str) -> str:
    parts = (_SOURCE.read_text(encoding="utf-8"), *_FLAGS, torch.__version__, platform.machine(), platform.system())
    return hashlib.sha256("\0".join([*parts, os.path.realpath(compiler)]).encode()).hexdigest()[:24]


def _folder() -> Path:
    """The user's own folder for what is compiled.

    Raises:
        OSError: it cannot be made, or others could put something into it.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "peft_sparse"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(folder, is_folder=True):
        raise PermissionError(f"{folder} belongs to somebody else, or others can write into it")
    return folder


def _is_ours(path: Path, *, is_folder: bool) -> bool:
    """Whether a folder or file is there that nobody but this user (or root) can change."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    is_kind = stat.S_ISDIR(found.st_mode) if is_folder else stat.S_ISREG(found.st_mode)
    return is_kind and found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _compile(compiler: str, path: Path) -> None:
    start = time.monotonic()
    with atomic_file(path) as temporary:
        command = [compiler, *_FLAGS, os.fspath(_SOURCE), "-o", os.fspath(temporary)]
        subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS_TO_COMPILE)
        temporary.chmod(0o700)
    logger.info("compiled kernels for this machine in %.0f s, once: %s", time.monotonic() - start, path)

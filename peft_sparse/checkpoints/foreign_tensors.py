"""Tensors out of files that another program wrote, trusting none of them: pickles run no code, and claims are checked
against the bytes that are there before memory is spent on them."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..checks import FLOAT_DTYPES
from ..errors import FormatError
from ..untrusted import UNREADABLE, check_regular, unpacked_bytes

# torch names what a pickle asks for in the middle of its advice to run it all the same.
_ASKED_FOR = re.compile(r"(?:GLOBAL|class|function) ([\w.]+)")


def load_foreign(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file or of a `.bin` file of torch's.

    Args:
        path: the file.

    Returns:
        {name: tensor} on the CPU: dense, of a floating-point dtype, finite in float32, which adapters compute in.

    Raises:
        FormatError: the file is damaged or incomplete, holds anything but named tensors of that kind, or claims to
            hold more than it has bytes. No code in it is run.
    """
    path = Path(path)
    check_regular(path)
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickled(path)
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise FormatError(f"{path} must hold named tensors and nothing else.")
    size = path.stat().st_size
    for key, tensor in content.items():
        _check(key, tensor, path)
    if (claimed := sum(tensor.nbytes for tensor in content.values())) > size:
        raise FormatError(f"{path} claims to hold {claimed} bytes of tensors in a file of {size} bytes.")
    for key, tensor in content.items():
        # Adapters compute in float32, where a float64 1e300 is infinite.
        if not bool(tensor.detach().to(torch.float32).isfinite().all()):
            raise FormatError(
                f"{path}: tensor {key!r} holds values that are NaN, infinite or too large for float32, so the training "
                "run that saved it had diverged. Nothing was loaded. Take an earlier checkpoint."
            )
    return {key: tensor.detach() for key, tensor in content.items()}


def _load_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except UNREADABLE as error:
        raise FormatError(
            f"{path} is not a readable safetensors file ({type(error).__name__}: {_first_line(error)}). Download it "
            "again."
        ) from error


def _load_pickled(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FormatError:
        raise
    except UNREADABLE as error:
        asked = _ASKED_FOR.search(str(error)) if "eights" in str(error) else None
        if asked is not None:
            reason = f"It asks for {asked[1]}, which no file of tensors needs"
        else:
            reason = f"It is damaged or incomplete ({type(error).__name__}); if it was downloaded, download it again"
        # Without the cause: torch's own message advises to run whatever is in the file.
        raise FormatError(
            f"{path} is not readable. {reason}. Pickles are read without running what is in them: only tensors."
        ) from None


def _check_archive(path: Path) -> None:
    """Refuse a zip file that would unpack to more than it is: torch stores tensors as they are."""
    size, unpacked = path.stat().st_size, sum(unpacked_bytes(path).values())
    if unpacked > size:
        raise FormatError(
            f"{path} is a compressed archive that claims to unpack to {unpacked} bytes from {size}; torch.save writes "
            "uncompressed ones. It is not opened."
        )


def _check(key: str, tensor: Tensor, path: Path) -> None:
    """Refuse what has no bytes of its own behind its shape, and what is no floating-point number."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        raise FormatError(f"{path}: tensor {key!r} must be a dense one with data, got {_described(tensor)}.")
    if tensor.dtype not in FLOAT_DTYPES.values():
        raise FormatError(
            f"{path}: tensor {key!r} must hold floating-point numbers (float32, float16, bfloat16 or float64), got "
            f"{_described(tensor)}."
        )
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise FormatError(f"{path}: tensor {key!r} claims the shape {list(tensor.shape)}, for which it has no data.")


def _described(tensor: Tensor) -> str:
    kind = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
    return f"{str(tensor.dtype).removeprefix('torch.')} ({kind})"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]

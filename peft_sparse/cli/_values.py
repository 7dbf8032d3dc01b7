"""Values that several commands take as text: sizes and dtypes."""

from __future__ import annotations

import re

import torch

from ..checks import dtype_named
from ..errors import ConfigError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_DTYPES = ("float32", "bfloat16", "float16")


def parse_size(text: str, *, name: str) -> int:
    """Bytes of a size such as "24GB", "500 MB" or "80GiB".

    Args:
        text: what the user wrote.
        name: what the error calls it.

    Raises:
        ConfigError: it is no such size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise ConfigError(f"{name} must be a size such as 24GB, 500MB or 80GiB, got {text!r}.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_dtype(text: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        ConfigError: it is none of those that models are trained in.
    """
    return dtype_named("dtype", text, _DTYPES)

"""Checks of values that many configs and functions share: errors that name field, value and the way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from fractions import Fraction
from math import isfinite
from numbers import Real
from typing import Any, TypeGuard

import torch

from .errors import ConfigError

# The dtypes that weights and values of adapters may have, by the names that configs give them.
FLOAT_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_REGEX = re.compile(r"[\\()\[\]{}*+?|^$]")
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp64": "float64"}


def nearest(value: object, known: Iterable[str]) -> str:
    """The sentence "Did you mean ...?" behind a blank, where a known name is spelled nearly so; else nothing."""
    names = {_plain(name): name for name in known}
    found = difflib.get_close_matches(_plain(str(value)), names, n=1)
    return f" Did you mean {names[found[0]]!r}?" if found else ""


def check_arguments(
    cls: type, positional: tuple[object, ...], keywords: Iterable[str], *, elsewhere: Mapping[str, str] | None = None
) -> None:
    """Refuse arguments that a config class does not take, with the name that was meant.

    Args:
        cls: a dataclass.
        positional: arguments without a name: the first would be PEFT's task_type, which nobody means.
        keywords: the names of the others.
        elsewhere: {what other libraries call it: what to write here}.

    Raises:
        TypeError: as Python's own, whose words PEFT looks for when it loads a file of a newer version.
    """
    if positional:
        first = repr(positional[0])
        raise TypeError(f"{cls.__name__}() takes its fields by name, such as density=0.01; got {first} without one.")
    known = [one.name for one in fields(cls) if one.init]
    for name in keywords:
        if name not in known:
            way_out = (elsewhere or {}).get(name)
            hint = f" {way_out}" if way_out else nearest(name, known)
            raise TypeError(f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}.{hint}")


def check_one_of(name: str, value: object, known: Iterable[str | None]) -> None:
    """Refuse a value that is none of the known ones.

    Raises:
        ConfigError: it is none; the message lists them, and names the one that was meant if it is spelled nearly so.
    """
    known = list(known)
    if not any(value == one for one in known):
        hint = nearest(value, [one for one in known if one is not None])
        raise ConfigError(f"{name} must be one of {known}, got {value!r}.{hint}")


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ConfigError: it is neither.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}.")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number, NaN and infinity among them; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number that a float can hold; True and False are none."""
    return is_number(value) and _fits_a_float(value)


def _fits_a_float(number: Any) -> bool:
    try:
        return isfinite(number)
    except OverflowError:  # an integer beyond all floats, which a file may hold
        return False


def as_decimal(number: float) -> Fraction:
    """The exact value of a number as it prints, so that 0.1 is a tenth."""
    return Fraction(repr(float(number)))


def check_whole(name: str, value: object, *, least: int = 1, way_out: str = "") -> None:
    """Refuse what is not a whole number of at least `least`.

    Raises:
        ConfigError: it is not; the message ends with `way_out`.
    """
    if not is_whole(value) or value < least:
        raise ConfigError(f"{name} must be an int >= {least}, got {value!r}.{' ' if way_out else ''}{way_out}")


def check_share(name: str, value: object, *, way_out: str = "") -> None:
    """Refuse what is not a share of something that is taken: a number in (0, 1].

    Raises:
        ConfigError: it is not; the message ends with `way_out`.
    """
    if not is_number(value) or not 0 < value <= 1:
        raise ConfigError(f"{name} must be in (0, 1], got {value!r}.{' ' if way_out else ''}{way_out}")


def check_factors(weights: Any, count: int) -> list[float]:
    """The factors of so many adapters in a sum, as plain numbers.

    Raises:
        ConfigError: they are not one finite number for each.
    """
    if isinstance(weights, (str, bytes)) or not hasattr(weights, "__len__"):
        raise ConfigError(f"weights must be a list with one number per adapter, got {weights!r}.")
    if len(weights) != count:
        raise ConfigError(f"weights must hold one number per adapter, got {len(weights)} for {count} adapters.")
    if not all(not isinstance(one, bool) and isinstance(one, Real) and _fits_a_float(one) for one in weights):
        raise ConfigError(f"weights must be finite numbers, got {list(weights)}.")
    return [float(one) for one in weights]


def check_modules(name: str, value: object) -> None:
    """Refuse what names no modules: the names are a list, and a text is one regular expression.

    Raises:
        ConfigError: it is neither, or a text that lists names.
    """
    if value is None:
        return
    if isinstance(value, str):
        if "," in value and not _REGEX.search(value):
            names = [piece.strip() for piece in value.split(",")]
            raise ConfigError(f"{name}={value!r} is one regular expression, not a list of names. Write {name}={names}.")
    elif not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(one, str) for one in value):
        raise ConfigError(f"{name} must be a list of module names or a regular expression, got {shortened(value)}.")


def check_layers(name: str, value: object) -> None:
    """Refuse what is neither the index of a layer nor a list of them.

    Raises:
        ConfigError: it is neither.
    """
    indices = value if isinstance(value, (list, tuple, set, frozenset, range)) else [value]
    if value is not None and not all(is_whole(one) for one in indices):
        raise ConfigError(f"{name} must be the index of a layer or a list of indices, got {shortened(value)}.")


def dtype_name(value: object) -> object:
    """The plain name of a dtype: of `torch.bfloat16`, "torch.bfloat16" and "bf16" alike; anything else comes back."""
    text = str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, str)) else value
    return _SHORT.get(text, text) if isinstance(text, str) else text


def dtype_named(name: str, value: object, known: Iterable[str]) -> torch.dtype:
    """The dtype that a value stands for, see `dtype_name`.

    Raises:
        ConfigError: it is none of the known ones.
    """
    found = dtype_name(value)
    check_one_of(name, found, known)
    return FLOAT_DTYPES[str(found)]


def shortened(value: object) -> str:
    """A value as Python writes it, cut where a file holds something endless."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")

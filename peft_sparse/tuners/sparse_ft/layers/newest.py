"""What a layer remembers of sets of adapters that take turns: the newest few."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

_Key, _Value = TypeVar("_Key"), TypeVar("_Value")
# Unions of supports that a tensor remembers.
_MOST = 4


def with_newest(known: dict[_Key, _Value], key: _Key, value: _Value, *, counted: Iterable[_Key]) -> dict[_Key, _Value]:
    """A copy with one more entry, without the oldest beyond four. The original stays: other threads may be reading it.

    Args:
        known: what was remembered, oldest first.
        key, value: of the entry, in place of what is under the key.
        counted: the keys that are too many beyond four; others stay.
    """
    others = [one for one in counted if one != key]
    gone = others[: max(0, len(others) - _MOST + 1)]
    return {**{k: v for k, v in known.items() if k not in gone}, key: value}

"""A cache of the newest few entries, for what a layer knows of sets of adapters that take turns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

_Key, _Value = TypeVar("_Key"), TypeVar("_Value")
# Entries that are kept.
_MOST = 4


def with_entry(cache: dict[_Key, _Value], key: _Key, value: _Value, *, counted: Iterable[_Key]) -> dict[_Key, _Value]:
    """A copy of a cache with one more entry, without the oldest beyond four.

    The original stays as it is, for other threads may be reading it.

    Args:
        cache: oldest first.
        key, value: of the entry; it replaces one of the same key.
        counted: keys of which only the newest four stay; other keys stay all.
    """
    others = [one for one in counted if one != key]
    gone = others[: max(0, len(others) - _MOST + 1)]
    return {**{k: v for k, v in cache.items() if k not in gone}, key: value}

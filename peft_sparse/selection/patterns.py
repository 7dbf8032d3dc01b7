"""Regular expressions that a config holds, and so perhaps a file of somebody else's: matched within a bounded time."""

from __future__ import annotations

import re

import regex

from ..errors import ConfigError

# Names of modules are short: what takes longer backtracks without end.
_SECONDS = 0.1
_LONGEST = 10_000


def check_pattern(field: str, pattern: str) -> None:
    """Check a regular expression on its own.

    Args:
        field: what holds it, for errors.
        pattern: in the syntax of Python's `re`.

    Raises:
        ConfigError: it is none, or is longer than 10,000 characters.
    """
    if len(pattern) > _LONGEST:
        raise ConfigError(f"{field}: a regular expression may have {_LONGEST} characters, got {len(pattern)}")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{field} {pattern[:200]!r} is not a valid regular expression: {error}") from error


def search(pattern: str, text: str) -> bool:
    """Whether a regular expression occurs in a text: `re.search`.

    Raises:
        ConfigError: it does not come to an end within a tenth of a second, or a few where it is slow to notice.
    """
    return _find("search", pattern, text) is not None


def fullmatch(pattern: str, text: str) -> bool:
    """Whether a regular expression describes a whole text: `re.fullmatch`, with the errors of `search`."""
    return _find("fullmatch", pattern, text) is not None


def match(pattern: str, text: str) -> regex.Match[str] | None:
    """A match at the beginning of a text: `re.match`, with the errors of `search`."""
    return _find("match", pattern, text)


def _find(how: str, pattern: str, text: str) -> regex.Match[str] | None:
    try:
        # `regex` is `re` with a limit of time.
        return getattr(regex, how)(pattern, text, timeout=_SECONDS)
    except TimeoutError as error:
        raise ConfigError(
            f"the regular expression {pattern[:200]!r} does not come to an end on {text[:200]!r}: it repeats what "
            "repeats already, such as (a+)+. Write it without that"
        ) from error
    except (regex.error, RecursionError, MemoryError) as error:
        raise ConfigError(f"{pattern[:200]!r} is not a usable regular expression: {error}") from error

"""Where benchmarks print: a terminal as wide as it is, and a file in which no figure is cut."""

from __future__ import annotations

import sys

from rich.console import Console


def wide_console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 200)

"""What benchmarks that take hours share: runs kept in a file as they finish, and progress by optimizer steps."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import stdev

from transformers import TrainerCallback


class Results:
    """The runs in a file, one JSON object a line; those of other settings are there but not looked at.

    Args:
        path: the file; it need not exist.
        fields: those of a run that tell it from the others.
        settings: {all that the result of a run depends on beside them}, of the run's value of the first field.
    """

    def __init__(self, path: Path, fields: tuple[str, ...], settings: Callable[[str], dict]) -> None:
        self._path, self._fields, self._settings = path, fields, settings
        self._runs: dict[tuple, dict] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            # A run that was killed while it wrote leaves half a line.
            with contextlib.suppress(json.JSONDecodeError):
                self._keep(json.loads(line))

    def _keep(self, run: dict) -> None:
        if run["settings"] == self._settings(run[self._fields[0]]):
            self._runs[tuple(run[field] for field in self._fields)] = run

    def add(self, run: dict) -> None:
        """Append a finished run, by one write."""
        run = {**run, "settings": self._settings(run[self._fields[0]])}
        self._keep(run)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "ab+", buffering=0) as file:
            torn = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
            file.write(b"\n" * bool(torn) + json.dumps(run).encode() + b"\n")
            os.fsync(file.fileno())

    def get(self, *key) -> dict | None:
        return self._runs.get(key)


class ShowSteps(TrainerCallback):
    """Calls `advance` after each optimizer step."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance = advance

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.advance()


def spread(numbers: list[float], digits: int = 4) -> str:
    """Standard deviation, where there are numbers enough for one."""
    return f"{stdev(numbers):.{digits}f}" if len(numbers) > 1 else "-"

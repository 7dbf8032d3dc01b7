"""What benchmarks that take hours share: runs and files kept as they finish, training, progress by optimizer steps."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, ItemsView
from pathlib import Path
from statistics import stdev

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES / "cross_lingual"), str(EXAMPLES)]

from _models import CACHE, multiplies_bfloat16  # noqa: E402

# What `--data` is where nothing is said, beside the repository; and where models lie.
DATA, MODELS = Path(__file__).resolve().parents[3] / "shared" / "data", CACHE
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Elsewhere a step under autocast takes fifty times as long as one in float32.
FAST_BFLOAT16 = multiplies_bfloat16()


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

    def items(self) -> ItemsView[tuple, dict]:
        """(values of the fields, run) of all runs of these settings."""
        return self._runs.items()


class ShowSteps(TrainerCallback):
    """Calls `advance` after each optimizer step."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.advance = advance

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.advance()


def spread(numbers: list[float], digits: int = 4) -> str:
    """Standard deviation, where there are numbers enough for one."""
    return f"{stdev(numbers):.{digits}f}" if len(numbers) > 1 else "-"


def train(
    model: nn.Module,
    rows,
    collator,
    *,
    steps: int,
    rate: float,
    seed: int,
    batch_size: int,
    advance: Callable[[], None],
    trainer: Callable[..., Trainer] = Trainer,
    **arguments,
) -> None:
    """Train with linear decay after warm-up over a tenth, under bfloat16 autocast where that is fast; nothing is
    logged or saved.

    `arguments`: more of TrainingArguments. `advance` is called after each optimizer step.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=rate,
            warmup_steps=max(1, steps // 10),
            seed=seed,
            bf16=FAST_BFLOAT16,
            use_cpu=DEVICE == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=DEVICE != "cpu",
            **arguments,
        )
        callbacks = [ShowSteps(advance)]
        running = trainer(model=model, args=args, train_dataset=rows, data_collator=collator, callbacks=callbacks)
        running.remove_callback(PrinterCallback)
        running.train()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """A file or folder, under another name until it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    write(temporary)
    os.replace(temporary, path)

"""Where a two-phase run stopped: which checkpoint, of which phase."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import FormatError
from .dense_checkpoint import FILE_NAME

# Inside the output folder. The Hub's upload leaves out what starts with an underscore.
DENSE_FOLDER = "_dense"
SELECTION_FOLDER = "selection"
SELECTION_FILE = "selection.json"
_STATE = "trainer_state.json"
Phase = Literal["dense", "selection", "sparse"]


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from.

    Attributes:
        phase: "dense"; "selection": at the boundary, with the support chosen and nothing else done; or "sparse".
        path: its folder.
    """

    phase: Phase
    path: str


def find_resume_point(output_dir: str, resume_from_checkpoint: str | bool | None) -> ResumePoint | None:
    """What `resume_from_checkpoint` means for a two-phase run; None for a fresh start.

    True takes the complete checkpoint that was written last, of whichever phase. One that was interrupted in the
    writing is passed over.

    Raises:
        FormatError: a path that is no checkpoint of ours.
        ValueError: True, and there is none.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint is False:
        return None
    if resume_from_checkpoint is not True:
        return _classify(str(resume_from_checkpoint))
    points = [(written, i, p) for i, p in enumerate(_all_points(output_dir)) if (written := _written_at(p)) is not None]
    if not points:
        raise ValueError(
            f"No valid checkpoint found in output directory ({output_dir}) nor in its folder {DENSE_FOLDER}: train "
            "without resume_from_checkpoint, or name a checkpoint."
        )
    return max(points, key=lambda found: found[:2])[2]


def _all_points(output_dir: str) -> list[ResumePoint]:
    """Every checkpoint of both phases, in the order in which one run would write them."""
    dense = os.path.join(output_dir, DENSE_FOLDER)
    return [
        *(ResumePoint("dense", path) for path in _numbered(dense)),
        *(ResumePoint("selection", path) for path in [os.path.join(dense, SELECTION_FOLDER)] if os.path.isdir(path)),
        *(ResumePoint("sparse", path) for path in _numbered(output_dir)),
    ]


def _numbered(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        return []
    names = [n for n in os.listdir(folder) if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", n)]
    return [os.path.join(folder, name) for name in sorted(names, key=lambda n: int(n.rpartition("-")[2]))]


def _written_at(point: ResumePoint) -> float | None:
    """When a checkpoint was completed; None if it was not. The trainer writes its state after everything else."""
    last = Path(point.path, SELECTION_FILE if point.phase == "selection" else _STATE)
    try:
        json.loads(last.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return last.stat().st_mtime


def _classify(path: str) -> ResumePoint:
    def has(name: str) -> bool:
        return os.path.isfile(os.path.join(path, name))

    if has(FILE_NAME):
        return ResumePoint("dense", path)
    if has(SELECTION_FILE):
        return ResumePoint("selection", path)
    if has(_STATE):
        return ResumePoint("sparse", path)
    raise FormatError(
        f"resume_from_checkpoint: {path} holds none of {FILE_NAME} (dense phase), {SELECTION_FILE} (boundary) and "
        f"{_STATE} (sparse phase)."
    )


def is_finished(state: TrainerState) -> bool:
    """Whether a phase has taken all its steps already, as a resumed one may have."""
    return state.max_steps > 0 and state.global_step >= state.max_steps

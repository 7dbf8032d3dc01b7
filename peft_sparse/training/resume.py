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
from . import dense_checkpoint, mask_phase

# {first phase: its folder inside the output folder}. The Hub's upload leaves out what starts with an underscore.
FIRST_FOLDERS = {"dense": "_dense", "mask": "_mask"}
# {first phase: the file that tells its checkpoints from others}
_FILES = {"dense": dense_checkpoint.FILE_NAME, "mask": mask_phase.FILE_NAME}
SELECTION_FOLDER = "selection"
SELECTION_FILE = "selection.json"
_STATE = "trainer_state.json"
FirstPhase = Literal["dense", "mask"]
Phase = Literal["dense", "mask", "selection", "second"]


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from.

    Attributes:
        phase: "dense" or "mask"; "selection": at the boundary, with the support chosen or the masks fixed and nothing
            else done; or "second".
        path: its folder.
    """

    phase: Phase
    path: str


def find_resume_point(
    output_dir: str, resume_from_checkpoint: str | bool | None, first: FirstPhase = "dense"
) -> ResumePoint | None:
    """What `resume_from_checkpoint` means for a two-phase run; None for a fresh start.

    True takes the complete checkpoint that was written last, of whichever phase. One that was interrupted in the
    writing is passed over.

    Args:
        output_dir: of the trainer.
        resume_from_checkpoint: a path, or True.
        first: which first phase the run has.

    Raises:
        FormatError: a path that is no checkpoint of ours.
        ValueError: True, and there is none.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint is False:
        return None
    if resume_from_checkpoint is not True:
        return _classify(str(resume_from_checkpoint), first)
    every = enumerate(_all_points(output_dir, first))
    points = [(written, i, p) for i, p in every if (written := _written_at(p)) is not None]
    if not points:
        raise ValueError(
            f"No valid checkpoint found in output directory ({output_dir}) nor in its folder {FIRST_FOLDERS[first]}: "
            "train without resume_from_checkpoint, or name a checkpoint."
        )
    return max(points, key=lambda found: found[:2])[2]


def _all_points(output_dir: str, first: FirstPhase) -> list[ResumePoint]:
    """Every checkpoint of both phases, in the order in which one run would write them."""
    folder = os.path.join(output_dir, FIRST_FOLDERS[first])
    return [
        *(ResumePoint(first, path) for path in _numbered(folder)),
        *(ResumePoint("selection", path) for path in [os.path.join(folder, SELECTION_FOLDER)] if os.path.isdir(path)),
        *(ResumePoint("second", path) for path in _numbered(output_dir)),
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


def _classify(path: str, first: FirstPhase) -> ResumePoint:
    def has(name: str) -> bool:
        return os.path.isfile(os.path.join(path, name))

    if has(_FILES[first]):
        return ResumePoint(first, path)
    if has(SELECTION_FILE):
        return ResumePoint("selection", path)
    if has(_STATE):
        return ResumePoint("second", path)
    raise FormatError(
        f"resume_from_checkpoint: {path} holds none of {_FILES[first]} ({first} phase), {SELECTION_FILE} (boundary) "
        f"and {_STATE} (second phase)."
    )


def is_finished(state: TrainerState) -> bool:
    """Whether a phase has taken all its steps already, as a resumed one may have."""
    return state.max_steps > 0 and state.global_step >= state.max_steps

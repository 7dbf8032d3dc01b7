"""Where a run stopped: which checkpoint, of which phase."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...errors import FormatError
from ..phases import dense_checkpoint, mask_phase
from .completeness import STATE, Fault, Needs, faults

logger = logging.getLogger(__name__)

# {first phase: its folder inside the output folder}. The Hub's upload leaves out what starts with an underscore.
FIRST_FOLDERS = {"dense": "_dense", "mask": "_mask"}
# {first phase: the file that tells its checkpoints from others}
_FILES = {"dense": dense_checkpoint.FILE_NAME, "mask": mask_phase.FILE_NAME}
SELECTION_FOLDER = "selection"
SELECTION_FILE = "selection.json"
FirstPhase = Literal["dense", "mask"]
Phase = Literal["dense", "mask", "selection", "second"]


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from.

    Attributes:
        phase: "dense" or "mask"; "selection": at the boundary, with the support chosen or the masks fixed and nothing
            else done; or "second", which is also that of a run in one phase.
        path: its folder.
    """

    phase: Phase
    path: str


def find_resume_point(
    output_dir: str,
    resume_from_checkpoint: str | bool | None,
    first: FirstPhase | None = "dense",
    *,
    needs: Needs | None = None,
) -> ResumePoint | None:
    """What `resume_from_checkpoint` means for a run; None for a fresh start.

    True takes the complete checkpoint that was written last, of whichever phase: one that holds, undamaged, all that a
    bit-identical resume needs. One whose writing was interrupted is passed over, and the log says why.

    Args:
        output_dir: of the trainer.
        resume_from_checkpoint: a path, or True.
        first: which first phase the run has; None if it has one phase only.
        needs: what the run has to find in a checkpoint besides the trainer's own files.

    Raises:
        FormatError: a path that is no checkpoint of ours, or a damaged one.
        ValueError: True, and there is none that is complete.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint is False:
        return None
    needs = needs if needs is not None else Needs()
    if resume_from_checkpoint is not True:
        point = _classify(str(resume_from_checkpoint), first)
        _check_named(point, needs)
        return point
    complete: list[tuple[float, int, ResumePoint]] = []
    passed_over: list[Fault] = []
    for i, point in enumerate(_all_points(output_dir, first)):
        fault = next(_faults(point, needs), None)
        if fault is None:
            complete.append((os.path.getmtime(_last_file(point)), i, point))
        else:
            passed_over.append(fault)
            logger.warning("resume_from_checkpoint=True passes over %s: %s", point.path, fault)
    if not complete:
        also = f" nor in its folder {FIRST_FOLDERS[first]}" if first is not None else ""
        why = f" ({'; '.join(map(str, passed_over))})" if passed_over else ""
        raise ValueError(
            f"No valid checkpoint found in output directory ({output_dir}){also}{why}: train without "
            "resume_from_checkpoint, or name a checkpoint."
        )
    return max(complete, key=lambda found: found[:2])[2]


def _check_named(point: ResumePoint, needs: Needs) -> None:
    """A checkpoint that a user names may lack what a trainer can do without, such as the state of the optimizer."""
    indispensable = {os.path.join(point.path, name) for name in _own_files(point)}
    for fault in _faults(point, needs):
        if not fault.is_missing or fault.path in indispensable or "adapter_" in os.path.basename(fault.path):
            raise fault.error()
        logger.warning("%s: the run goes on without it, and not as if it had never stopped.", fault)


def _all_points(output_dir: str, first: FirstPhase | None) -> list[ResumePoint]:
    """Every checkpoint of both phases, in the order in which one run would write them."""
    second = [ResumePoint("second", path) for path in _numbered(output_dir)]
    if first is None:
        return second
    folder = os.path.join(output_dir, FIRST_FOLDERS[first])
    selection = os.path.join(folder, SELECTION_FOLDER)
    return [
        *(ResumePoint(first, path) for path in _numbered(folder)),
        *(ResumePoint("selection", path) for path in [selection] if os.path.isdir(path)),
        *second,
    ]


def _numbered(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        return []
    names = [n for n in os.listdir(folder) if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", n)]
    return [os.path.join(folder, name) for name in sorted(names, key=lambda n: int(n.rpartition("-")[2]))]


def _last_file(point: ResumePoint) -> Path:
    """The file that is written after everything else."""
    return Path(point.path, SELECTION_FILE if point.phase == "selection" else STATE)


def _own_files(point: ResumePoint) -> tuple[str, ...]:
    """What makes a folder a checkpoint of this phase."""
    if point.phase == "selection":
        return (SELECTION_FILE,)
    return (STATE,) if point.phase == "second" else (STATE, _FILES[point.phase])


def _faults(point: ResumePoint, needs: Needs) -> Iterator[Fault]:
    if point.phase == "dense":
        # Its own file holds all tensors, and nothing is reselected in it.
        needs = Needs(training=needs.training, rank=needs.rank)
    return faults(point.path, _own_files(point), needs)


def _classify(path: str, first: FirstPhase | None) -> ResumePoint:
    def has(name: str) -> bool:
        return os.path.isfile(os.path.join(path, name))

    if first is not None and has(_FILES[first]):
        return ResumePoint(first, path)
    for other in _FILES:
        if has(_FILES[other]):
            raise FormatError(
                f"resume_from_checkpoint: {path} is of a {other} phase ({_FILES[other]}), and no adapter of this run "
                "has one before it. Make the model as for the first start: get_peft_model(model, config)."
            )
    if has(SELECTION_FILE):
        return ResumePoint("selection", path)
    if has(STATE):
        return ResumePoint("second", path)
    known = {SELECTION_FILE: "boundary", STATE: "second phase" if first is not None else "trainer's checkpoint"}
    if first is not None:
        known = {_FILES[first]: f"{first} phase", **known}
    names = ", ".join(f"{name} ({what})" for name, what in known.items())
    raise FormatError(
        f"resume_from_checkpoint: {path} holds none of {names}. A checkpoint whose writing was cut short "
        "cannot be resumed from; resume_from_checkpoint=True takes the newest complete one of the output folder."
    )


def is_finished(state: TrainerState) -> bool:
    """Whether a phase has taken all its steps already, as a resumed one may have."""
    return state.max_steps > 0 and state.global_step >= state.max_steps

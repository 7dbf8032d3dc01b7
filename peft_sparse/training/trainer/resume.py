"""Where a run stopped: which checkpoint, of which phase."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...errors import FormatError
from ..phases import registry as registry  # so that all phases are known
from ..phases.phase import PHASES, SECOND, SELECTION, phase_called
from .completeness import STATE, Fault, Needs, faults

logger = logging.getLogger(__name__)

SELECTION_FOLDER = "selection"
SELECTION_FILE = "selection.json"


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to go on from.

    Attributes:
        phase: the name of a first phase ("dense", "mask"); "selection": at the boundary, with the support chosen or the
            masks fixed and nothing else done; or "second", which is also that of a run in one phase.
        path: its folder.
    """

    phase: str
    path: str


def find_resume_point(
    output_dir: str,
    resume_from_checkpoint: str | bool | None,
    first: str | None = "dense",
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
        also = f" nor in its folder {phase_called(first).folder}" if first is not None else ""
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


def _all_points(output_dir: str, first: str | None) -> list[ResumePoint]:
    """Every checkpoint of both phases, in the order in which one run would write them."""
    second = [ResumePoint(SECOND, path) for path in _numbered(output_dir)]
    if first is None:
        return second
    folder = os.path.join(output_dir, phase_called(first).folder)
    selection = os.path.join(folder, SELECTION_FOLDER)
    return [
        *(ResumePoint(_phase_of(path, first), path) for path in _numbered(folder)),
        *(ResumePoint(SELECTION, path) for path in [selection] if os.path.isdir(path)),
        *second,
    ]


def _sharing(first: str) -> list[tuple[str, str]]:
    """(name, file) of the phases whose checkpoints lie in a phase's folder: its own first."""
    kind = phase_called(first)
    found = [(p.name, p.file_name) for p in PHASES.values() if p.folder == kind.folder and p.file_name is not None]
    return sorted(found, key=lambda pair: pair[0] != first)


def _phase_of(path: str, first: str) -> str:
    """Which phase a checkpoint in a phase's folder is of; of two that share it, the one whose file is there."""
    sharing = _sharing(first)
    there = [name for name, file in sharing if os.path.isfile(os.path.join(path, file))]
    return next(iter([*there, *(name for name, _ in sharing)]), first)


def _numbered(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        return []
    names = [n for n in os.listdir(folder) if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", n)]
    return [os.path.join(folder, name) for name in sorted(names, key=lambda n: int(n.rpartition("-")[2]))]


def _last_file(point: ResumePoint) -> Path:
    """The file that is written after everything else."""
    return Path(point.path, SELECTION_FILE if point.phase == SELECTION else STATE)


def _own_files(point: ResumePoint) -> tuple[str, ...]:
    """What makes a folder a checkpoint of this phase."""
    if point.phase == SELECTION:
        return (SELECTION_FILE,)
    file_name = None if point.phase == SECOND else phase_called(point.phase).file_name
    return (STATE,) if file_name is None else (STATE, file_name)


def _faults(point: ResumePoint, needs: Needs) -> Iterator[Fault]:
    if point.phase in PHASES and not PHASES[point.phase].holds_adapter:
        # Its own file holds all tensors, and nothing is reselected in it.
        needs = Needs(training=needs.training, rank=needs.rank)
    return faults(point.path, _own_files(point), needs)


def _classify(path: str, first: str | None) -> ResumePoint:
    def has(name: str) -> bool:
        return os.path.isfile(os.path.join(path, name))

    if first is not None and any(has(file) for _, file in _sharing(first)):
        return ResumePoint(_phase_of(path, first), path)
    for other in PHASES.values():
        if other.file_name is not None and has(other.file_name):
            raise FormatError(
                f"resume_from_checkpoint: {path} is of a {other.name} phase ({other.file_name}), and no adapter of "
                "this run has one before it. Make the model as for the first start: get_peft_model(model, config)."
            )
    if has(SELECTION_FILE):
        return ResumePoint(SELECTION, path)
    if has(STATE):
        return ResumePoint(SECOND, path)
    known = {SELECTION_FILE: "boundary", STATE: "second phase" if first is not None else "trainer's checkpoint"}
    if first is not None:
        known = {**{file: f"{name} phase" for name, file in _sharing(first)}, **known}
    names = ", ".join(f"{name} ({what})" for name, what in known.items())
    raise FormatError(
        f"resume_from_checkpoint: {path} holds none of {names}. A checkpoint whose writing was cut short "
        "cannot be resumed from; resume_from_checkpoint=True takes the newest complete one of the output folder."
    )


def is_finished(state: TrainerState) -> bool:
    """Whether a phase has taken all its steps already, as a resumed one may have."""
    return state.max_steps > 0 and state.global_step >= state.max_steps

"""The checkpoints of a run, and which one `--resume RUN[@STEP]` means.

A resumed run has its own directory, which names its parent, so nothing is ever cut from a store:
the history of runs is a tree.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from tui_trainer.config.run_spec import RunSpec, read_spec
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import RunEntry
from tui_trainer.runs.registry import resolve

CHECKPOINTS, CHECKPOINT_STATE = "checkpoints", "state.json"
"""Folder of a run's checkpoints, and the file that is written last into each, so that its presence
shows that the checkpoint is complete."""


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a new run resumes from."""

    run: RunEntry
    spec: RunSpec
    """The parent's."""
    step: int
    checkpoint: Path


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the run in `directory` keeps its checkpoint of `step`."""
    return directory / CHECKPOINTS / f"step-{step:08}"


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints of the run in `directory`, in order."""
    states = (directory / CHECKPOINTS).glob(f"step-*/{CHECKPOINT_STATE}")
    names = (path.parent.name for path in states)
    return sorted(int(name[5:]) for name in names if name[5:].isdecimal())


def find_resume_point(given: str, runs_dir: str | os.PathLike[str] | None = None) -> ResumePoint:
    """The newest checkpoint for `RUN`, the one of the given step for `RUN@STEP`. Raises
    RunError."""
    name, at, wanted = given.rpartition("@")
    if not at or not wanted.isdecimal():
        name, wanted = given, ""
    run = resolve(name, runs_dir)
    try:
        spec = read_spec(run.directory)
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read what {run.name} trained: {error}") from error
    steps = checkpoint_steps(run.directory)
    if spec.is_script:
        again = shlex.join(["tui-trainer", *spec.command[1:]])
        weights = f"; weights are in {run.directory / CHECKPOINTS}" if steps else ""
        raise RunError(
            f"{run.name} ran a script, which resumes by its own means",
            f"start it again, with its own option for it: {again}{weights}",
        )
    if not steps:
        raise RunError(
            f"{run.name} has no checkpoint to resume from",
            f"tui-trainer checkpoint {run.name} writes one"
            if run.live
            else "--checkpoint-every N writes some, and a run writes one when it ends",
        )
    step = int(wanted) if wanted else steps[-1]
    if step not in steps:
        known = ", ".join(map(str, steps))
        raise RunError(f"{run.name} has no checkpoint of step {step:,}", f"it has those of {known}")
    return ResumePoint(run, spec, step, checkpoint_path(run.directory, step))

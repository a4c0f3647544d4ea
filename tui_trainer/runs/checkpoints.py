"""Going on from a run: which of its checkpoints, and what of it the new run takes over.

The new run has a directory of its own that names its parent, so nothing is ever cut from a store:
the history of runs is a tree.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tui_trainer.config.run_spec import RunSpec, read_spec
from tui_trainer.runs.registry import RunEntry, resolve
from tui_trainer.runs.security import RunError

CHECKPOINTS, WHOLE = "checkpoints", "state.json"
"""Folder of a run, and the file that a checkpoint has once it is whole."""


@dataclass(frozen=True)
class Branch:
    """Where a new run begins."""

    run: RunEntry
    spec: RunSpec
    """The parent's."""
    step: int
    checkpoint: Path


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints that a run has, in order."""
    names = (path.parent.name for path in (directory / CHECKPOINTS).glob(f"step-*/{WHOLE}"))
    return sorted(int(name[5:]) for name in names if name[5:].isdecimal())


def find_branch(given: str, runs_dir: str | os.PathLike[str] | None = None) -> Branch:
    """What `RUN` or `RUN@STEP` means: the newest checkpoint, or that step's. Raises RunError."""
    name, at, wanted = given.rpartition("@")
    if not at or not wanted.isdecimal():
        name, wanted = given, ""
    run = resolve(name, runs_dir)
    try:
        spec = read_spec(run.directory)
    except (OSError, ValueError) as fault:
        raise RunError(f"{run.name} does not say what it trained: {fault}") from fault
    steps = checkpoint_steps(run.directory)
    if spec.task == "script":
        weights = f"; weights are in {run.directory / CHECKPOINTS}" if steps else ""
        raise RunError(
            f"{run.name} ran a script, which goes on by its own means",
            f"give the script its own option for it{weights}",
        )
    if not steps:
        raise RunError(
            f"{run.name} has no checkpoint to go on from",
            f"tui-trainer checkpoint {run.name} writes one"
            if run.live
            else "--checkpoint-every N writes some, and so does the end of a run",
        )
    step = int(wanted) if wanted else steps[-1]
    if step not in steps:
        known = ", ".join(map(str, steps))
        raise RunError(f"{run.name} has no checkpoint of step {step:,}", f"it has those of {known}")
    return Branch(run, spec, step, run.directory / CHECKPOINTS / f"step-{step:08}")

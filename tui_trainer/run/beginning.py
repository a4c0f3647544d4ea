"""What is settled before torch is imported: how threads wait, and what is known of the run."""

from __future__ import annotations

import os
import platform
import socket
import time

from tui_trainer import __version__
from tui_trainer.config.spec import RunSpec
from tui_trainer.protocol.describe import RunInfo

SPIN_COUNT = "10000"
"""Turns that an OpenMP thread spins at a barrier before it sleeps; GNU's default is 300,000."""


def bound_openmp_spinning() -> None:
    """Let OpenMP's threads sleep soon at barriers, unless the user chose otherwise.

    GNU's runtime spins for about a millisecond at each barrier. With any other load the spinners
    hold the cores that the thread they wait for needs, and steps take ten times as long and more;
    a shorter spin costs a few percent on an idle machine (docs/decisions.md). Results do not
    change. It must be said before torch is imported.
    """
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if not chosen:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def first_description(spec: RunSpec) -> RunInfo:
    """What is known of a run before anything of it is imported."""
    title = spec.title
    if not title and spec.task == "script":
        path = os.path.abspath(spec.script or "")  # a folder may be called `.` or end in `/`
        name = f"-m {spec.script}" if spec.module else os.path.basename(path)
        title = " ".join((name, *spec.arguments))[:200]
    elif not title:
        preset = spec.configuration.get("preset")
        title = f"{spec.task} · {preset}" if preset else spec.task
    return RunInfo(
        name=spec.name,
        task=spec.task,
        title=title,
        command=spec.command,
        directory=spec.directory,
        host=socket.gethostname(),
        pid=os.getpid(),
        started_at=time.time(),
        versions={
            "tui-trainer": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        configuration=dict(spec.configuration),
        working_directory=spec.working_directory or os.getcwd(),
        parent=spec.parent,
        branch_step=spec.branch_step,
        budget=spec.budget,
    )

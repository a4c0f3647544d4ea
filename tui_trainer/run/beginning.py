"""What is known of a run before anything of it is imported."""

from __future__ import annotations

import os
import platform
import socket
import time

from tui_trainer import __version__
from tui_trainer.config.spec import RunSpec
from tui_trainer.protocol.describe import RunInfo


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

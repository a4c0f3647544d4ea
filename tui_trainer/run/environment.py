"""Which version of the user's own code is trained: the git commit of the working directory.

Git is asked beside the training, with a time limit: a slow file system, a huge repository or no git
at all cost a run nothing but this line of its record. It is no child of this process: a script that
waits for any of its children would be given ours, and the SIGCHLD of a child that ends at once
breaks off a long write to a pipe, of which an unbuffered Python (`-u`) then drops the rest. (Where
this process inherits orphans, as the first one of a container does, it is taken in here.)
"""

from __future__ import annotations

import contextlib
import os
import platform
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from tui_trainer import __version__
from tui_trainer.config.machine import OtherLoad, allowed_cores, cpu_quota, usable_cores
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.protocol.schema import RunInfo, SourceInfo

TIMEOUT_S = 10.0
CLEAN, DIRTY = "clean", "dirty"
# A shell that leaves at once, and what it has left behind: its own exit is all that we see.
ASK = f"""{{
    ask() {{ git -c core.fsmonitor=false "$@"; }}
    ask rev-parse --verify HEAD || exit
    ask rev-parse --abbrev-ref HEAD || echo
    changes=$(ask status --porcelain --untracked-files=no) || exit
    if [ -n "$changes" ]; then echo {DIRTY}; else echo {CLEAN}; fi
}} &"""
# Looking must not write: `git status` would else refresh the index.
SILENT = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}


def find_source(directory: str, timeout_s: float = TIMEOUT_S) -> SourceInfo | None:
    """What git says of `directory`; None when it is no working tree or git cannot say.

    `dirty` says whether tracked files were changed, staged or not, anywhere in the working tree.
    """
    asked = _ask(directory)
    return _understood(asked.answer(timeout_s)) if asked is not None else None


def look_up_source(directory: str, found: Callable[[SourceInfo], None]) -> threading.Thread | None:
    """Find it without making anybody wait; `found` is called, on the thread that is returned, if
    there is one. Nothing started here is left that this process could be told of."""
    asked = _ask(directory)
    if asked is None:
        return None

    def look() -> None:
        source = _understood(asked.answer(TIMEOUT_S))
        if source is not None:
            found(source)

    thread = threading.Thread(target=look, name="tui-trainer source", daemon=True)
    thread.start()
    return thread


@dataclass(frozen=True)
class _Asked:
    """Git at work in a process group of its own."""

    group: int
    read_end: int

    def answer(self, timeout_s: float) -> bytes:
        """All that it says in this time; what takes longer is ended."""
        said, deadline = b"", time.monotonic() + timeout_s
        try:
            while self._readable(max(0.0, deadline - time.monotonic())):
                data = os.read(self.read_end, 1 << 12)
                if not data:
                    return said
                said += data
            with contextlib.suppress(OSError):
                os.killpg(self.group, signal.SIGKILL)
            return said
        finally:
            os.close(self.read_end)
            with contextlib.suppress(ChildProcessError):  # mostly it is not ours to wait for
                while True:
                    os.waitpid(-self.group, 0)

    def _readable(self, timeout_s: float) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self.read_end, selectors.EVENT_READ)
            return bool(selector.select(timeout_s))


def _ask(directory: str) -> _Asked | None:
    try:
        read_end, write_end = os.pipe()
    except OSError:
        return None
    try:
        shell = subprocess.Popen(
            ["/bin/sh", "-c", ASK],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=write_end,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **SILENT},
            start_new_session=True,
        )
        shell.wait()
    except (OSError, ValueError):
        os.close(read_end)
        return None
    finally:
        os.close(write_end)
    return _Asked(shell.pid, read_end)


def _understood(said: bytes) -> SourceInfo | None:
    lines = said.decode("utf-8", "replace").splitlines()
    if not lines:
        return None
    branch = lines[1] if len(lines) > 1 else ""
    dirty = {CLEAN: False, DIRTY: True}.get(lines[2]) if len(lines) > 2 else None
    return SourceInfo(lines[0], dirty, "" if branch == "HEAD" else branch)


# ---- spinning
# How OpenMP's threads wait for each other: settled once, before torch is imported.


# type: ignore[import-untyped, unused-ignore]


SPIN_COUNT = "10000"
"""Turns that an OpenMP thread spins at a barrier before it sleeps, where others need the cores."""
TOLERATED_CORES = 0.5
"""What others may use besides: a screen now and then takes a core from nobody for long."""


def limit_openmp_spinning(spec: RunSpec, others: OtherLoad) -> None:
    """Let OpenMP's threads sleep soon at barriers where other programs use the cores that they
    would spin on, unless the user chose otherwise.

    GNU's runtime spins 300,000 turns at each barrier, some 15 ms. On a machine that has nothing
    else to do that is best: a thread that sleeps has to be woken, and steps take up to a quarter
    longer. Where more threads want to run than there are cores, the spinners hold those that the
    thread they wait for needs, and steps take twenty times as long (docs/decisions.md has the
    figures). Results do not change. It must be said before torch is imported.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return
    threads = expected_threads(spec)
    crowded = threads + others.cores() > allowed_cores() + TOLERATED_CORES
    if crowded or threads > cpu_quota() + TOLERATED_CORES:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def expected_threads(spec: RunSpec) -> int:
    """How many PyTorch will use at most: a task's as asked for, or all cores but one; a script's as
    in its environment, or as many as there are cores, of which PyTorch knows no quota."""
    if spec.task != "script":
        asked = spec.configuration.get("threads")
        return asked if isinstance(asked, int) and asked > 0 else max(1, usable_cores() - 1)
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if said.isdecimal() and int(said):
        return int(said)
    return min(allowed_cores(), psutil.cpu_count(logical=False) or allowed_cores())


# ---- beginning
# What is known of a run before anything of it is imported.


def initial_info(spec: RunSpec) -> RunInfo:
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

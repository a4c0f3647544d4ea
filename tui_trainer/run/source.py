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
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tui_trainer.protocol.describe import SourceInfo

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

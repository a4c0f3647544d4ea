"""Which version of the user's own code is trained: the git commit of the working directory.

Asked of git on a thread of its own, with a time limit: a slow file system, a huge repository or no
git at all cost a run nothing but this line of its record.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable

from tui_trainer.protocol.describe import SourceInfo

TIMEOUT_S = 10.0


def find_source(directory: str, timeout_s: float = TIMEOUT_S) -> SourceInfo | None:
    """What git says of `directory`; None when it is no working tree or git cannot say.

    `dirty` counts changes to tracked files, staged or not, anywhere in the working tree.
    """
    asked = _git(directory, timeout_s, "rev-parse", "--verify", "HEAD")
    if asked is None:
        return None
    commit = asked.strip()
    branch = (_git(directory, timeout_s, "rev-parse", "--abbrev-ref", "HEAD") or "").strip()
    changes = _git(directory, timeout_s, "status", "--porcelain", "--untracked-files=no")
    dirty = None if changes is None else bool(changes.strip())
    return SourceInfo(commit, dirty, "" if branch == "HEAD" else branch)


def _git(directory: str, timeout_s: float, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", directory, "-c", "core.fsmonitor=false", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            # Looking must not write: `git status` would else refresh the index.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"},
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def look_up_source(directory: str, found: Callable[[SourceInfo], None]) -> threading.Thread:
    """Find it without making anybody wait; `found` is called, on that thread, if there is one."""

    def look() -> None:
        source = find_source(directory)
        if source is not None:
            found(source)

    thread = threading.Thread(target=look, name="tui-trainer source", daemon=True)
    thread.start()
    return thread

"""Which version of the user's code a run trains: the git commit of the working directory.

The command asks git before the run begins, so that no process of ours is a child of the training.
"""

from __future__ import annotations

import os
import subprocess

from tui_trainer.protocol.schema import SourceInfo

TIMEOUT_S = 2.0
"""For each of the two calls: a slow file system delays the start of a run by no more."""
READ_ONLY = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
"""Without the first, `git status` refreshes the index."""


def find_source(directory: str, timeout_s: float = TIMEOUT_S) -> SourceInfo | None:
    """The commit, the branch and the state of the working tree that `directory` is in.

    None outside a working tree, before the first commit, and when git is missing or too slow.
    `dirty` is None when only the second call was too slow.
    """
    head = _git(directory, timeout_s, "rev-parse", "HEAD", "--abbrev-ref", "HEAD")
    if head is None or len(named := head.split()) != 2:
        return None
    commit, branch = named
    changes = _git(directory, timeout_s, "status", "--porcelain", "--untracked-files=no")
    dirty = None if changes is None else changes != ""
    return SourceInfo(commit, dirty, "" if branch == "HEAD" else branch)


def _git(directory: str, timeout_s: float, *arguments: str) -> str | None:
    """What git prints; None when it fails, is missing or takes too long."""
    try:
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", *arguments],
            cwd=directory,
            env={**os.environ, **READ_ONLY},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None

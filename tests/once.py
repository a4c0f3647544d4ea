"""Expensive read-only fixtures, made once for all test processes of a session."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

SESSION = "TUI_TRAINER_TEST_SESSION"
"""In the environment: a directory of this session, made and removed by `tests/conftest.py`."""


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The directory `name`, filled by `make` in the first process that asks for it."""
    made = Path(os.environ[SESSION]) / name
    with open(made.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "made").exists():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(mode=0o700)
            make(made)
            (made / "made").touch()
    return made

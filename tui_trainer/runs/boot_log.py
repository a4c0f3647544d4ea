"""`boot.log`: what a run process prints before its own log begins, and fatal errors of the
interpreter."""

from __future__ import annotations

import os
import re
from pathlib import Path

BOOT_LOG = "boot.log"
_READ_BYTES = 64_000
_TAIL_CHARACTERS = 4_000
_FATAL = re.compile(r"^Fatal Python error: .+$", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in ', re.MULTILINE)


def last_output(directory: str | os.PathLike[str]) -> str:
    """The fatal error of the process, or the end of what it printed; "" when it printed nothing."""
    try:
        printed = _tail(directory).strip()
    except OSError as error:
        return f"cannot read {BOOT_LOG}: {error.strerror}"
    return _summary(printed) or printed[-_TAIL_CHARACTERS:]


def fatal_error(directory: str | os.PathLike[str]) -> str:
    """The fatal error of the process and where it happened, on one line; "" for none."""
    try:
        return _summary(_tail(directory))
    except OSError:
        return ""


def fatal_traceback(directory: str | os.PathLike[str]) -> str:
    """The fatal error with the stack of every thread, as faulthandler printed it; "" for none."""
    try:
        printed = _tail(directory)
    except OSError:
        return ""
    found = _FATAL.search(printed)
    return printed[found.start() :] if found else ""


def _summary(printed: str) -> str:
    found = _FATAL.search(printed)
    if found is None:
        return ""
    # The current thread is the one that died; its newest frame comes first.
    frame = _FRAME.search(printed, max(found.end(), printed.find("Current thread")))
    return found[0] + (f" ({os.path.basename(frame[1])}, line {frame[2]})" if frame else "")


def _tail(directory: str | os.PathLike[str]) -> str:
    with open(Path(directory) / BOOT_LOG, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _READ_BYTES))
        return file.read().decode("utf-8", "replace")

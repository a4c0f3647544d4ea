"""What a run process prints before it takes its output over, and what kills it: `boot.log`."""

from __future__ import annotations

import os
import re
from pathlib import Path

BOOT_LOG = "boot.log"
_READ_BYTES = 64_000
_TAIL_CHARACTERS = 4_000
_FATAL = re.compile(r"^Fatal Python error: .+$", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in ', re.MULTILINE)


def last_words(directory: str | os.PathLike[str]) -> str:
    """What killed the process, or the end of what it printed; "" when it printed nothing."""
    try:
        printed = _end_of(directory).strip()
    except OSError as fault:
        return f"cannot read {BOOT_LOG}: {fault.strerror}"
    return fatal(printed) or printed[-_TAIL_CHARACTERS:]


def fatal_words(directory: str | os.PathLike[str]) -> str:
    """What killed the process and where, in one line; "" where nothing says so."""
    try:
        return fatal(_end_of(directory))
    except OSError:
        return ""


def fatal_pages(directory: str | os.PathLike[str]) -> str:
    """All that was printed when the process was killed: the stack of each thread; "" for none."""
    try:
        printed = _end_of(directory)
    except OSError:
        return ""
    found = _FATAL.search(printed)
    return printed[found.start() :] if found else ""


def fatal(printed: str) -> str:
    """What killed the interpreter and where, of the pages that faulthandler prints; "" for none."""
    found = _FATAL.search(printed)
    if found is None:
        return ""
    # Of several threads it is the current one that died; its newest frame comes first.
    frame = _FRAME.search(printed, max(found.end(), printed.find("Current thread")))
    return found[0] + (f" ({os.path.basename(frame[1])}, line {frame[2]})" if frame else "")


def _end_of(directory: str | os.PathLike[str]) -> str:
    with open(Path(directory) / BOOT_LOG, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _READ_BYTES))
        return file.read().decode("utf-8", "replace")

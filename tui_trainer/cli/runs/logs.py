"""`tui-trainer logs RUN`: what the run printed, as its log file has it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tui_trainer.cli.errors import CommandError
from tui_trainer.cli.runs.common import RunName, RunsDir, chosen, one_message
from tui_trainer.config.spec import LOG_FILE
from tui_trainer.session.launch import BOOT_LOG
from tui_trainer.session.registry import Run, look_at

LOOK_EVERY_S = 0.2
_BLOCK = 1 << 16


def logs(
    run: RunName = None,
    *,
    follow: Annotated[
        bool,
        Parameter(
            name=("--follow", "-f"),
            help="go on printing until the run ends",
            negative=(),
            show_default=False,
        ),
    ] = False,
    runs_dir: RunsDir = None,
) -> int:
    """what a run printed; -f follows it"""
    with one_message():
        found = chosen(run, runs_dir, live=False)
    path = _log_of(found)
    if path is None and not (follow and found.live):
        raise CommandError(
            f"{found.name} has printed nothing", f"its directory is {found.directory}"
        )
    position = _copy(path, 0) if path else 0
    while follow and _still_there(found):
        time.sleep(LOOK_EVERY_S)
        position = _copy(path, position) if (path := _log_of(found)) else 0
    if path is not None:
        _copy(path, position)
    return 0


def _log_of(run: Run) -> Path | None:
    """The log, or what the process printed before it began one: why it did not start, perhaps."""
    for name in (LOG_FILE, BOOT_LOG):
        path = run.directory / name
        if path.is_file() and path.stat().st_size:
            return path
    return None


def _still_there(run: Run) -> bool:
    now = look_at(run.directory)
    return now is not None and now.live


def _copy(path: Path, position: int) -> int:
    """Print what follows `position`; returns where it ends now."""
    terminal = sys.stdout.isatty()
    with open(path, "rb") as file:
        file.seek(position)
        while block := file.read(_BLOCK):
            if block.endswith(b"\xc2"):  # with what follows it may be a control character
                block += file.read(1)
            sys.stdout.buffer.write(_harmless(block) if terminal else block)
            position += len(block)
    sys.stdout.flush()
    return position


def _harmless(block: bytes) -> bytes:
    """On a terminal, what a script printed must not move the cursor or answer for the user: only
    colours (which end in `m`) pass."""
    import re

    passed = re.sub(rb"\x1b(?!\[[\d;:]*m)|\xc2[\x80-\x9f]", b"\xef\xbf\xbd", block)
    return re.sub(rb"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]", b"", passed)

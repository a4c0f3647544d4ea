"""`tui-trainer logs RUN`: what the run printed, as its log file has it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tui_trainer.cli.commands.common import RunName, RunsDir, choose_run_by_name, cli_errors
from tui_trainer.cli.errors import CommandError
from tui_trainer.config.run_spec import LOG_FILE
from tui_trainer.runs.boot_log import BOOT_LOG, fatal_traceback
from tui_trainer.runs.liveness import RunEntry, inspect_run

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
    with cli_errors():
        found = choose_run_by_name(run, runs_dir, live=False)
    printed = Printed(found)
    while follow and _still_there(found):
        printed.go_on()
        time.sleep(LOOK_EVERY_S)
    printed.go_on()
    if not _still_there(found):
        printed.say_fatal_end()
    if printed.path is None and not (follow and found.live):
        raise CommandError(
            f"{found.name} has printed nothing", f"its directory is {found.directory}"
        )
    return 0


class Printed:
    """What of a run's output was copied so far."""

    def __init__(self, run: RunEntry) -> None:
        self._run = run
        self.path: Path | None = None
        self._position = 0

    def go_on(self) -> None:
        """Copy what has come since."""
        path = _log_of(self._run)
        if path is None:
            return
        if path != self.path:  # the run has begun its log
            self.path, self._position = path, 0
        self._position = _copy(path, self._position)

    def say_fatal_end(self) -> None:
        """What killed the process cannot be in its own log any more."""
        pages = fatal_traceback(self._run.directory).encode()
        if pages and self.path is not None and self.path.name == LOG_FILE:
            _write(pages)
            sys.stdout.flush()


def _log_of(run: RunEntry) -> Path | None:
    """The log, or what the process printed before it began one: why it did not start, perhaps."""
    for name in (LOG_FILE, BOOT_LOG):
        path = run.directory / name
        if path.is_file() and path.stat().st_size:
            return path
    return None


def _still_there(run: RunEntry) -> bool:
    now = inspect_run(run.directory)
    return now is not None and now.live


def _copy(path: Path, position: int) -> int:
    """Print what follows `position`; returns where it ends now."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) < position:
            position = 0  # another file: the run's directory was removed and made again
        file.seek(position)
        while block := file.read(_BLOCK):
            if block.endswith(b"\xc2"):  # with what follows it may be a control character
                block += file.read(1)
            _write(block)
            position += len(block)
    sys.stdout.flush()
    return position


def _write(block: bytes) -> None:
    sys.stdout.buffer.write(_harmless(block) if sys.stdout.isatty() else block)


def _harmless(block: bytes) -> bytes:
    """On a terminal, what a script printed must not move the cursor or answer for the user: only
    colours (which end in `m`) pass."""
    import re

    passed = re.sub(rb"\x1b(?!\[[\d;:]*m)|\xc2[\x80-\x9f]", b"\xef\xbf\xbd", block)
    return re.sub(rb"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]", b"", passed)

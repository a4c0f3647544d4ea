"""`tui-trainer logs RUN`: the output of a run, from its log file."""

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
from tui_trainer.protocol.text import keep_colors_only
from tui_trainer.runs.boot_log import BOOT_LOG, fatal_traceback
from tui_trainer.runs.liveness import RunEntry, inspect_run

POLL_EVERY_S = 0.2
_BLOCK = 1 << 16


def logs(
    run: RunName = None,
    *,
    follow: Annotated[
        bool,
        Parameter(
            name=("--follow", "-f"),
            help="print new output until the run ends",
            negative=(),
            show_default=False,
        ),
    ] = False,
    runs_dir: RunsDir = None,
) -> int:
    """print the output of a run; -f follows it"""
    with cli_errors():
        found = choose_run_by_name(run, runs_dir, live=False)
    copier = LogCopier(found)
    while follow and _is_live(found):
        copier.copy_new()
        time.sleep(POLL_EVERY_S)
    copier.copy_new()
    if not _is_live(found):
        copier.copy_fatal_traceback()
    if copier.path is None and not (follow and found.live):
        raise CommandError(
            f"{found.name} has printed nothing", f"its directory is {found.directory}"
        )
    return 0


class LogCopier:
    """Copies the output of a run to stdout, from where the last copy ended."""

    def __init__(self, run: RunEntry) -> None:
        self._run = run
        self.path: Path | None = None
        self._position = 0

    def copy_new(self) -> None:
        """Copy what was added since the last call."""
        path = _log_of(self._run)
        if path is None:
            return
        if path != self.path:  # the run has opened its log
            self.path, self._position = path, 0
        self._position = _copy(path, self._position)

    def copy_fatal_traceback(self) -> None:
        """Print the traceback of a fatal error, which the process could not write to its log."""
        text = fatal_traceback(self._run.directory).encode()
        if text and self.path is not None and self.path.name == LOG_FILE:
            _write(text)
            sys.stdout.flush()


def _log_of(run: RunEntry) -> Path | None:
    """The log file, or else the boot log, which may say why the run did not start."""
    for name in (LOG_FILE, BOOT_LOG):
        path = run.directory / name
        if path.is_file() and path.stat().st_size:
            return path
    return None


def _is_live(run: RunEntry) -> bool:
    now = inspect_run(run.directory)
    return now is not None and now.live


def _copy(path: Path, position: int) -> int:
    """Print what follows `position` and return the new end."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) < position:
            position = 0  # another file: the directory was removed and created again
        file.seek(position)
        while block := file.read(_BLOCK):
            if block.endswith(b"\xc2"):  # the next byte may complete a control character
                block += file.read(1)
            _write(block)
            position += len(block)
    sys.stdout.flush()
    return position


def _write(block: bytes) -> None:
    sys.stdout.buffer.write(keep_colors_only(block) if sys.stdout.isatty() else block)

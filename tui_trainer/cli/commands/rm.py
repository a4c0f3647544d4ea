"""`tui-trainer rm RUN`: removes a run's directory with its recording and checkpoints."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from tui_trainer.cli.commands.common import RunsDir, cli_errors, confirmed
from tui_trainer.cli.errors import CommandError, UsageError
from tui_trainer.cli.table import new_table, table_lines
from tui_trainer.config.run_spec import SPEC_FILE, find_socket, read_spec, remove_run
from tui_trainer.protocol.formatting import bytes_, rough_duration
from tui_trainer.protocol.text import sanitize
from tui_trainer.runs.liveness import RunEntry, may_be_running
from tui_trainer.runs.registry import resolve
from tui_trainer.runs.security import answers

HEADINGS = ("RUN", "STATE", "STEP", "TIME", "SIZE", "DIRECTORY")
EXIT_TIMEOUT_S, POLL_EVERY_S = 20.0, 0.1
"""An ended run waits a few seconds for its viewers, or for a slow disk or reader."""


def rm(
    *runs: Annotated[
        str,
        Parameter(help="the runs: names, prefixes of names, or directories", show_default=False),
    ],
    yes: Annotated[
        bool,
        Parameter(name=("--yes", "-y"), help="do not ask", negative=(), show_default=False),
    ] = False,
    runs_dir: RunsDir = None,
) -> int:
    """remove runs that have ended, with everything they recorded"""
    if not runs:
        raise UsageError("rm needs a run", "tui-trainer ls lists them")
    with cli_errors():
        found = list(
            {run.directory: run for run in (resolve(each, runs_dir) for each in runs)}.values()
        )
    for run in found:
        if run.live:
            raise CommandError(f"{run.name} is {run.state}", f"tui-trainer stop {run.name} ends it")
        _check(run)
    if yes:
        _refuse_abbreviations(runs, found)
    elif not _confirmed(found):
        return 1
    for run in found:
        _remove(run)
        print(f"removed {run.name}")
    return 0


def _check(run: RunEntry) -> None:
    """Raise CommandError unless `run` certainly is a run and certainly has ended."""
    try:
        read_spec(run.directory)
    except (OSError, ValueError) as error:
        raise CommandError(
            f"{run.directory} may not be a run: it has no valid {SPEC_FILE}",
            "remove it by hand if you are sure",
        ) from error
    if run.directory.is_symlink():
        raise CommandError(f"{run.directory} is a link to another directory", "remove it by hand")
    _wait_for_exit(run)
    if why := may_be_running(run):
        raise CommandError(
            f"{run.name} may still be running: {why}", "end it first, on its machine"
        )
    within = [
        path.parent for path in run.directory.rglob(SPEC_FILE) if path.parent != run.directory
    ]
    if within:
        raise CommandError(
            f"{run.directory} contains other runs, such as {within[0].name}",
            "remove or move those first",
        )


def _wait_for_exit(run: RunEntry) -> None:
    """Wait for an ended run that is still answering its viewers."""
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    announced = False
    while (
        run.reported.ended and answers(find_socket(run.directory)) and time.monotonic() < deadline
    ):
        if not announced:
            text = f"{run.name} has ended: waiting for its process to exit"
            print(text, file=sys.stderr, flush=True)
            announced = True
        time.sleep(POLL_EVERY_S)


def _refuse_abbreviations(given: tuple[str, ...], found: list[RunEntry]) -> None:
    """With --yes, names must be complete: a prefix may match another run tomorrow."""
    names = {run.name for run in found}
    for name in set(given) - names:
        for full in names:
            if full.startswith(name):
                raise UsageError(f"{name} is not the whole name of a run", f"it is {full}")


def _confirmed(runs: list[RunEntry]) -> bool:
    if not sys.stdin.isatty():
        raise UsageError("rm asks before it removes, and the input is not a terminal", "add --yes")
    table = new_table(HEADINGS, right=("STEP", "TIME", "SIZE"))
    for run in runs:
        status = run.reported
        cells = (
            sanitize(run.name),
            run.state,
            f"{status.step:,}",
            rough_duration(status.elapsed_s),
            bytes_(_size(run.directory), 0),
            sanitize(str(run.directory)),
        )
        table.add_row(*map(Text, cells))
    console = Console(highlight=False)
    for line in table_lines(table):
        console.print(line, soft_wrap=True)
    what = "it" if len(runs) == 1 else f"these {len(runs)} runs"
    return confirmed(f"remove {what} permanently?")


def _size(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


def _remove(run: RunEntry) -> None:
    try:
        remove_run(run.directory)
    except OSError as error:
        raise CommandError(f"cannot remove {run.directory}: {error.strerror or error}") from error

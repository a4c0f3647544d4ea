"""`tui-trainer rm RUN`: a run's directory, with its records and checkpoints, for good."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tui_trainer.cli.commands.common import RunsDir, cli_errors
from tui_trainer.cli.errors import CommandError, UsageError
from tui_trainer.config.run_spec import SPEC_FILE, find_socket, read_spec, remove_run
from tui_trainer.protocol.formatting import rough_duration
from tui_trainer.runs.liveness import RunEntry, may_be_running
from tui_trainer.runs.registry import resolve
from tui_trainer.runs.security import answers

LEAVES_WITHIN_S, LOOK_EVERY_S = 20.0, 0.1
"""A run that has ended lingers for its viewers, and for a disk or a reader that is slow."""


def rm(
    *runs: Annotated[
        str,
        Parameter(help="the runs: names, beginnings of names, or directories", show_default=False),
    ],
    yes: Annotated[
        bool,
        Parameter(name=("--yes", "-y"), help="do not ask", negative=(), show_default=False),
    ] = False,
    runs_dir: RunsDir = None,
) -> int:
    """remove runs that have ended, with all that was recorded"""
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
    elif not _agreed(found):
        return 1
    for run in found:
        _remove(run)
        print(f"removed {run.name}")
    return 0


def _check(run: RunEntry) -> None:
    """Only what is surely a run, and surely over. Raises CommandError."""
    try:
        read_spec(run.directory)
    except (OSError, ValueError) as fault:
        raise CommandError(
            f"{run.directory} is not surely a run's directory: it holds no {SPEC_FILE} of one",
            "remove it by hand, if that is what you mean",
        ) from fault
    if run.directory.is_symlink():
        raise CommandError(f"{run.directory} is a link to another directory", "remove it by hand")
    _let_it_leave(run)
    if why := may_be_running(run):
        raise CommandError(f"{run.name} may still live: {why}", "end it first, where it runs")
    within = [
        path.parent for path in run.directory.rglob(SPEC_FILE) if path.parent != run.directory
    ]
    if within:
        raise CommandError(
            f"other runs are kept within {run.directory}, such as {within[0].name}",
            "remove or move those first",
        )


def _let_it_leave(run: RunEntry) -> None:
    """Wait for a run that has told its end and stays a few seconds more, for its viewers."""
    deadline = time.monotonic() + LEAVES_WITHIN_S
    said = False
    while (
        run.reported.ended and answers(find_socket(run.directory)) and time.monotonic() < deadline
    ):
        if not said:
            text = f"{run.name} has ended and tells its viewers: waiting until it has left"
            print(text, file=sys.stderr, flush=True)
            said = True
        time.sleep(LOOK_EVERY_S)


def _refuse_abbreviations(given: tuple[str, ...], found: list[RunEntry]) -> None:
    """What is removed unasked must have been named in full: the beginning of a name may mean
    another run tomorrow."""
    names = {run.name for run in found}
    for name in set(given) - names:
        for full in names:
            if full.startswith(name):
                raise UsageError(f"{name} is not the whole name of a run", f"it is {full}")


def _agreed(runs: list[RunEntry]) -> bool:
    if not sys.stdin.isatty():
        raise UsageError("rm asks before it removes, and nobody can answer here", "say --yes")
    for run in runs:
        said = run.reported
        print(
            f"{run.name}: {run.state} at step {said.step:,} "
            f"after {rough_duration(said.elapsed_s)}, "
            f"{_size(run.directory) / 1e6:,.1f} MB in {run.directory}"
        )
    what = "it" if len(runs) == 1 else f"these {len(runs)} runs"
    try:
        return input(f"remove {what} for good? [y/N] ").strip().casefold() in ("y", "yes")
    except EOFError:
        return False


def _size(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


def _remove(run: RunEntry) -> None:
    try:
        remove_run(run.directory)
    except OSError as fault:
        raise CommandError(f"cannot remove {run.directory}: {fault.strerror or fault}") from fault

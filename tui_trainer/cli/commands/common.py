"""What the commands for runs share: their common flags, and errors in one voice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tui_trainer.cli.errors import CommandError
from tui_trainer.runs.errors import RunError
from tui_trainer.runs.liveness import RunEntry
from tui_trainer.runs.registry import list_runs, newest, resolve
from tui_trainer.store.schema import StoreError

NAMED = "the run: its name, the beginning of it, or its directory"
RunName = Annotated[
    str | None,
    Parameter(help=f"{NAMED} (default: the newest live one, else the newest)", show_default=False),
]
LiveRunName = Annotated[
    str | None,
    Parameter(
        help=f"{NAMED} (default: the live one, where there is one alone)", show_default=False
    ),
]
RunsDir = Annotated[
    Path | None,
    Parameter(
        help="where runs are kept (also $TUI_TRAINER_RUNS_DIR)",
        show_default=False,
        negative=(),
        metavar="DIR",
    ),
]


def flag(help: str) -> Parameter:
    """A flag that is off unless given."""
    return Parameter(help=help, negative=(), show_default=False)


@contextlib.contextmanager
def cli_errors() -> Iterator[None]:
    """What is wrong with a run becomes the one message of the command."""
    try:
        yield
    except RunError as fault:
        raise CommandError(fault.message, fault.hint) from fault


@contextlib.contextmanager
def readable(directory: Path) -> Iterator[None]:
    """A recording that cannot be opened becomes the one message, with where to look instead."""
    try:
        yield
    except (StoreError, OSError) as fault:
        hint = f"tui-trainer show {directory} says what is known"
        raise CommandError(str(fault), hint) from fault


def choose_run_by_name(run: str | None, runs_dir: Path | None, live: bool = True) -> RunEntry:
    """The run that is named, or else the newest live one (any, where `live` is False)."""
    if run is not None:
        return resolve(run, runs_dir)
    runs = list_runs(runs_dir)
    if live or any(each.live for each in runs):
        return newest(runs)
    return newest(runs, live=False)


def require_single_run(run: str | None, runs_dir: Path | None) -> RunEntry:
    """The run that is named, or else the live one: commands do not guess between several."""
    if run is not None:
        return resolve(run, runs_dir)
    runs = list_runs(runs_dir)
    live = [each for each in runs if each.live]
    if len(live) > 1:
        names = ", ".join(each.name for each in live[:8])
        raise RunError(f"{len(live)} runs are live", f"say which: {names}")
    return newest(runs)

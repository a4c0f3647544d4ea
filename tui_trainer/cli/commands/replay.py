"""`tui-trainer replay RUN`: opens the screens over a recording, with a cursor in time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tui_trainer.cli.commands.common import (
    RunName,
    RunsDir,
    choose_run_by_name,
    cli_errors,
    flag,
    readable,
)
from tui_trainer.cli.errors import UsageError
from tui_trainer.cli.terminal import why_no_screen
from tui_trainer.client.replay import ReplaySession


def replay(
    run: RunName = None,
    *,
    ascii: Annotated[bool, flag("draw with ASCII characters only")] = False,
    slow_link: Annotated[
        bool,
        flag("send less to the terminal: one frame in 2 s, and at once after a key"),
    ] = False,
    runs_dir: RunsDir = None,
) -> int:
    """replay a run step by step, read-only; a live one too"""
    if reason := why_no_screen():
        raise UsageError(
            reason, "tui-trainer report RUN writes a page, tui-trainer export RUN the values"
        )
    with cli_errors():
        found = choose_run_by_name(run, runs_dir, live=False)
    session = open_recording(found.directory)
    from tui_trainer.cli.screen import run_app_until_exit
    from tui_trainer.ui.replay_app import run_replay

    seen = ReplayResult(session, found.name, found.directory)
    return run_app_until_exit(
        lambda: run_replay(session, ascii=ascii, slow_link=slow_link), lambda: seen
    )


def open_recording(directory: Path) -> ReplaySession:
    """The recording of a run. Raises CommandError when there is none."""
    with readable(directory):
        return ReplaySession(directory)


class ReplayResult:
    """The replayed run, for the exit summary."""

    def __init__(self, session: ReplaySession, name: str, directory: Path) -> None:
        self._session = session
        self._name = name
        self.directory = directory

    def print_summary(self) -> int:
        """Print the step of the cursor and return the exit status."""
        session = self._session
        print(f"{self._name} shown at step {session.cursor:,} of {session.last_step:,}", flush=True)
        return 0

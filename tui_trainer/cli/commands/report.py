"""`tui-trainer report RUN`: one page about a run, to keep or to send."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tui_trainer.cli.commands.common import (
    RunName,
    RunsDir,
    choose_run_by_name,
    cli_errors,
    readable,
)
from tui_trainer.cli.errors import CommandError, notify
from tui_trainer.client.replay import ReplaySession
from tui_trainer.config.atomic_file import replacing
from tui_trainer.protocol.schema import RunInfo


def report(
    run: RunName = None,
    *,
    output: Annotated[
        Path | None,
        Parameter(
            help="the file to write (default: <run>.html here; - for standard output)",
            show_default=False,
            metavar="FILE",
            allow_leading_hyphen=True,
        ),
    ] = None,
    runs_dir: RunsDir = None,
) -> int:
    """write one HTML page about a run: charts, configuration and events"""
    from tui_trainer.report.page import render
    from tui_trainer.report.read import ReportData

    with cli_errors():
        found = choose_run_by_name(run, runs_dir, live=False)
    path = output or Path(f"{found.name}.html")
    with readable(found.directory):
        session = ReplaySession(found.directory)
    try:
        snapshot = session.poll()
        info = snapshot.info or RunInfo(found.name, found.reported.task)
        pieces = render(ReportData(session.history, info, snapshot.status))
        if str(path) == "-":
            sys.stdout.writelines(pieces)
            return 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with (
                replacing(path) as partial,
                open(partial, "w", encoding="utf-8", errors="replace") as file,
            ):
                file.writelines(pieces)
        except OSError as error:
            reason = error.strerror or str(error)
            raise CommandError(f"cannot write {path}: {reason}") from error
    finally:
        if session.history.store.fault:
            notify(session.history.store.fault)
        session.close()
    print(f"wrote {path}")
    return 0

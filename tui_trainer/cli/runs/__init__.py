"""The commands for runs that are there already: list, attach, control, show, remove."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cyclopts import App

COMMANDS = (
    *("attach", "ls", "show", "logs"),
    *("pause", "resume", "step", "stop", "checkpoint"),
    *("rm", "doctor"),
)
HIDDEN = ("relay",)
"""For the far end of an ssh connection, not for people."""


def register(app: App) -> None:
    """Add these commands to the command line."""
    from cyclopts import Group

    from tui_trainer.cli.runs import (
        attaching,
        controlling,
        diagnosing,
        listing,
        logs,
        removing,
        showing,
    )
    from tui_trainer.cli.runs.relay import relay

    runs = Group("Runs", sort_key=1)
    app.command(attaching.attach, group=runs)
    app.command(listing.ls, group=runs)
    app.command(showing.show, group=runs)
    app.command(logs.logs, group=runs)
    for command in (controlling.pause, controlling.resume, controlling.step):
        app.command(command, group=runs)
    for command in (controlling.stop, controlling.checkpoint):
        app.command(command, group=runs)
    app.command(removing.rm, group=runs)
    app.command(diagnosing.doctor, group=Group("This machine", sort_key=2))
    app.command(relay, show=False)

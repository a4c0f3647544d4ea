"""The commands for runs that are there already: list, attach, control, look back, remove."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cyclopts import App

_PACKAGE = "tui_trainer.cli.commands"
_ABOUT_RUNS = {
    "attach": ("attach", "open the screen over a live run, here or over ssh"),
    "ls": ("ls", "the runs: live, paused, finished, stopped, crashed"),
    "show": ("show", "one picture of a run in text, or one JSON object"),
    "logs": ("logs", "what a run printed; -f follows it"),
    "pause": ("control", "stop a run at its next phase boundary; resume goes on"),
    "resume": ("control", "let a paused run go on"),
    "step": ("control", "make one optimizer step, or so many, then pause"),
    "stop": ("control", "finish the running step, then end the run"),
    "checkpoint": ("control", "write a checkpoint at the next step boundary and go on"),
    "rm": ("rm", "remove runs that have ended, with all that was recorded"),
}
"""Command to its module and its line in the help. The modules are imported when they are called
for: together they take longer than the help takes to print."""
_ABOUT_THE_PAST = {
    "replay": ("replay", "look back at a run, step by step; read-only, live ones too"),
    "compare": ("compare", "overlay losses and norms of runs, and how their options differ"),
    "report": ("report", "one page with a run's charts, configuration and events"),
    "export": ("export", "a run as CSV, JSON lines, Parquet or TensorBoard files"),
}
_ABOUT_MACHINE = {
    "doctor": ("doctor", "versions, device, terminal, permissions, and what is missing"),
}

COMMANDS = (*_ABOUT_RUNS, *_ABOUT_THE_PAST, *_ABOUT_MACHINE)
HIDDEN = ("relay",)
"""For the far end of an ssh connection, not for people."""


def register(app: App) -> None:
    """Add these commands to the command line."""
    from cyclopts import Group

    for about, group in (
        (_ABOUT_RUNS, Group("Runs", sort_key=1)),
        (_ABOUT_THE_PAST, Group("Looking back", sort_key=2)),
        (_ABOUT_MACHINE, Group("This machine", sort_key=3)),
    ):
        for name, (module, line) in about.items():
            app.command(f"{_PACKAGE}.{module}:{name}", name=name, help=line, group=group)
    app.command(f"{_PACKAGE}.relay:relay", name="relay", show=False)

"""The commands for runs that are there already: list, attach, control, look back, remove."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cyclopts import App

_PACKAGE = "tui_trainer.cli.runs"
_ABOUT_RUNS = {
    "attach": ("attaching", "open the screen over a live run, here or over ssh"),
    "ls": ("listing", "the runs: live, paused, finished, stopped, crashed"),
    "show": ("showing", "one picture of a run in text, or one JSON object"),
    "logs": ("logs", "what a run printed; -f follows it"),
    "pause": ("controlling", "stop a run at its next phase boundary; resume goes on"),
    "resume": ("controlling", "let a paused run go on"),
    "step": ("controlling", "make one optimizer step, or so many, then pause"),
    "stop": ("controlling", "finish the running step, then end the run"),
    "checkpoint": ("controlling", "write a checkpoint at the next step boundary and go on"),
    "rm": ("removing", "remove runs that have ended, with all that was recorded"),
}
"""Command to its module and its line in the help. The modules are imported when they are called
for: together they take longer than the help takes to print."""
_ABOUT_THE_PAST = {
    "replay": ("replaying", "look back at a run, step by step; read-only, live ones too"),
    "compare": ("comparing", "overlay losses and norms of runs, and how their options differ"),
    "report": ("reporting", "one page with a run's charts, configuration and events"),
    "export": ("exporting", "a run as CSV, JSON lines, Parquet or TensorBoard files"),
}
_ABOUT_MACHINE = {
    "doctor": ("diagnosing", "versions, device, terminal, permissions, and what is missing"),
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

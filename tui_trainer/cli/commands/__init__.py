"""The commands other than those that train, a file for each or for a few that belong together,
imported when they are called."""

from __future__ import annotations

from keyword import iskeyword
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cyclopts import App

_PACKAGE = "tui_trainer.cli.commands"
_RUNS = {
    "attach": ("attach", "open the screen over a live run, here or over ssh"),
    "ls": ("ls", "list the runs: live, paused, finished, stopped, crashed"),
    "show": ("show", "show a run as text, or as one JSON object"),
    "logs": ("logs", "print the output of a run; -f follows it"),
    "pause": ("control", "pause a run at its next phase boundary"),
    "resume": ("control", "resume a paused run"),
    "step": ("control", "make one optimizer step, or N, then pause"),
    "stop": ("control", "finish the running step, then end the run"),
    "break": ("breakpoints", "pause a run when a condition is met, or list its breakpoints"),
    "inspect": ("inspect", "inspect a tensor of a live run, or list its tensors"),
    "attention": ("attention", "what a head attends to, and what it adds to the stream"),
    "autograd": ("autograd", "show the autograd graph of a live run's loss"),
    "gradcheck": ("autograd", "check a gradient of a live run against numerical ones"),
    "back": ("back", "take a live run back to an earlier step"),
    "branch": (
        "branch",
        "start a new run from the current step of a live one, with other settings",
    ),
    "what-if": ("experiments", "compare the next steps with present and with changed settings"),
    "lr-finder": ("experiments", "measure the loss while the learning rate grows"),
    "landscape": ("experiments", "measure the loss along a direction from the weights"),
    "set": ("control", "change the learning rate or another setting of a live run, or list them"),
    "checkpoint": ("control", "write a checkpoint at the next step boundary"),
    "rm": ("rm", "remove runs that have ended"),
}
"""Command to its module and its line in the help, so that help imports no command."""
_RECORDINGS = {
    "replay": ("replay", "replay a run step by step, read-only; a live one too"),
    "compare": ("compare", "overlay the losses and norms of runs, and how their options differ"),
    "report": ("report", "write one HTML page about a run"),
    "export": ("export", "write a run as CSV, JSON lines, Parquet or TensorBoard files"),
}
_LEARN = {
    "demo": ("demo", "short trainings with one fault each: what names it, what cures it"),
    "graph": ("graph", "a graph of scalars: values, gradients and the chain rule, step by step"),
    "learn": ("learn", "learn how training works from pages that measure what they state"),
}
_MACHINE = {
    "explain": ("explain", "explain a rule of the findings, or list all of them"),
    "doctor": ("doctor", "check versions, device, terminal, permissions, and what is missing"),
}

BUILTINS = ("set",)
"""Commands whose names are Python's own: their functions end in an underscore, too."""
COMMANDS = (*_RUNS, *_RECORDINGS, *_LEARN, *_MACHINE)
HIDDEN = ("relay",)
"""Used on the remote side of an ssh connection."""


def register(app: App) -> None:
    """Add these commands to the command line."""
    from cyclopts import Group

    for about, group in (
        (_RUNS, Group("Runs", sort_key=1)),
        (_RECORDINGS, Group("Recordings", sort_key=2)),
        (_LEARN, Group("Learn", sort_key=3)),
        (_MACHINE, Group("This machine", sort_key=4)),
    ):
        for name, (module, line) in about.items():
            function = name.replace("-", "_")
            function = f"{function}_" if iskeyword(name) or name in BUILTINS else function
            app.command(f"{_PACKAGE}.{module}:{function}", name=name, help=line, group=group)
    app.command(f"{_PACKAGE}.relay:relay", name="relay", show=False)

"""The sink that writes to this process's standard output."""

from __future__ import annotations

import os

from tui_trainer.recording.items import Sink
from tui_trainer.run.capture import stdout_to_stderr, whole_lines
from tui_trainer.run.sinks.jsonlines import JsonLines
from tui_trainer.run.sinks.output import Output
from tui_trainer.run.sinks.plain import PlainLines


def open_sink(kind: str) -> Sink:
    """`plain` or `json`. With `json`, whatever else is printed to stdout from now on, by this
    process or its children, goes to stderr, so that stdout is nothing but JSON."""
    if kind == "json":
        return JsonLines(Output(stdout_to_stderr()))
    if kind == "plain":
        whole_lines()
        return PlainLines(Output(os.dup(1)))
    raise ValueError(f"no sink is called {kind}")

"""Off a terminal: the run is done in this very process, and tells its story in lines on stdout."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

from tui_trainer.cli.directory import discard_refused
from tui_trainer.cli.errors import FAULT, USAGE
from tui_trainer.cli.screen import last_reported
from tui_trainer.client.connection import RunGone, Stream
from tui_trainer.client.live import LiveSession
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.protocol.formatting import number
from tui_trainer.record.events import Sink
from tui_trainer.run.output import stdout_to_stderr, whole_lines
from tui_trainer.run.sinks import Output
from tui_trainer.run.sinks.jsonlines import JsonLines
from tui_trainer.run.sinks.plain import PlainLines
from tui_trainer.run.worker import Worker


def show_lines(spec: RunSpec, kind: Literal["plain", "json"]) -> int:
    """Do the run; returns its exit status."""
    from tui_trainer.run.host import main

    pass  # MOVED

    status = main(spec, open_sink(kind))
    discard_refused(spec)
    return status


# ---- in_app
# `--in-app`: the training on a worker thread of the app itself, spoken to over a socketpair.


class InApp:
    """A run that lives and ends with this process."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._worker = Worker(spec)
        self._stream: Stream | None = Stream.of_socket(self._worker.viewer)
        self.session = LiveSession(self._connect)

    @property
    def directory(self) -> Path:
        """Of the run."""
        return Path(self._spec.directory)

    def _connect(self) -> Stream:
        stream, self._stream = self._stream, None
        if stream is None:
            raise RunGone("the training thread has ended")
        return stream

    def say_goodbye(self) -> int:
        """End the training if it has not ended, and say how; returns the exit status."""
        self.session.close()
        if not self._worker.wait(0):
            print("finishing the step: a run started with --in-app ends with it", file=sys.stderr)
            self._worker.stop()
            self._worker.wait()
        said = last_reported(self._spec)
        if said is None:
            return FAULT
        if said.refused:
            print(f"{said.name} could not start: {said.reason}", flush=True)
            if said.hint:
                print(f"  hint: {said.hint}", file=sys.stderr)
            discard_refused(self._spec)
            return USAGE
        reason = f": {said.reason}" if said.state == "crashed" and said.reason else ""
        print(
            f"{said.name} {said.state} at step {said.step:,}, loss {number(said.loss, 0)}"
            f"{reason} · {self.directory}",
            flush=True,
        )
        return FAULT if said.state == "crashed" else 0


def show_in_app(spec: RunSpec, ascii: bool, slow_link: bool = False) -> int:
    """Train on a worker thread and show it until the user leaves; returns the exit status."""
    from tui_trainer.cli.screen import load_app, run_app_until_exit

    run_app = load_app()
    opened = InApp(spec)
    return run_app_until_exit(
        lambda: run_app(opened.session, ascii=ascii, slow_link=slow_link, ends_with_app=True),
        lambda: opened,
    )


# ---- opening
# The sink that writes to this process's standard output.


def open_sink(kind: str) -> Sink:
    """`plain` or `json`. With `json`, whatever else is printed to stdout from now on, by this
    process or its children, goes to stderr, so that stdout is nothing but JSON."""
    if kind == "json":
        return JsonLines(Output(stdout_to_stderr()))
    if kind == "plain":
        whole_lines()
        return PlainLines(Output(os.dup(1)))
    raise ValueError(f"no sink is called {kind}")

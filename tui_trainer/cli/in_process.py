"""Runs in this process: without a terminal, as lines on stdout; with `--in-app`, on a thread."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Literal

from tui_trainer.cli.errors import FAULT, USAGE
from tui_trainer.cli.run_setup import discard_refused
from tui_trainer.cli.screen import status_on_disk
from tui_trainer.client.connection import connector
from tui_trainer.client.live import LiveSession
from tui_trainer.config.run_spec import RunSpec
from tui_trainer.protocol.formatting import number
from tui_trainer.record.events import Sink
from tui_trainer.run.output import redirect_stdout_to_stderr, use_line_buffering
from tui_trainer.run.sinks import Output
from tui_trainer.run.sinks.jsonlines import JsonLines
from tui_trainer.run.sinks.plain import PlainLines
from tui_trainer.run.worker import Worker
from tui_trainer.runs.errors import RunGone


def show_lines(spec: RunSpec, kind: Literal["plain", "json"]) -> int:
    """Run with plain or JSON lines on stdout and return the exit status."""
    from tui_trainer.run.host import main

    status = main(spec, open_sink(kind))
    discard_refused(spec)
    return status


def show_launched_lines(spec: RunSpec, kind: Literal["plain", "json"]) -> int:
    """The same with several processes: start their launcher and return its exit status."""
    from tui_trainer.runs.launch import run_command

    process = subprocess.Popen([*run_command(spec), f"--{kind}"])
    while True:
        try:
            status = process.wait()
            break
        except KeyboardInterrupt:  # the launcher has got it too, and ends its processes
            continue
    discard_refused(spec)
    return status if status >= 0 else 128 - status


def open_sink(kind: Literal["plain", "json"]) -> Sink:
    """The sink that writes to stdout. With `json`, everything else that this process and its
    children print to stdout goes to stderr, so that stdout is only JSON."""
    if kind == "json":
        return JsonLines(Output(redirect_stdout_to_stderr()))
    use_line_buffering()
    return PlainLines(Output(os.dup(1)))


class InApp:
    """A run on a worker thread of this process, connected by a socketpair."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._worker = Worker(spec)
        self._unused: socket.socket | None = self._worker.viewer
        self.session = LiveSession(connector(self._connect))

    @property
    def directory(self) -> Path:
        return Path(self._spec.directory)

    def _connect(self) -> socket.socket:
        connected, self._unused = self._unused, None
        if connected is None:
            raise RunGone("the training thread has ended")
        return connected

    def print_summary(self) -> int:
        """End the training if it is still running, print its state and return the exit status."""
        self.session.close()
        if not self._worker.wait(0):
            print("finishing the step: a run with --in-app ends with the app", file=sys.stderr)
            self._worker.stop()
            self._worker.wait()
        state = status_on_disk(self._spec)
        if state is None:
            return FAULT
        if state.refused:
            print(f"{state.name} could not start: {state.reason}", flush=True)
            if state.hint:
                print(f"  hint: {state.hint}", file=sys.stderr)
            discard_refused(self._spec)
            return USAGE
        reason = f": {state.reason}" if state.state == "crashed" and state.reason else ""
        print(
            f"{state.name} {state.state} at step {state.step:,}, loss {number(state.loss, 0)}"
            f"{reason} · {self.directory}",
            flush=True,
        )
        return FAULT if state.state == "crashed" else 0


def show_in_app(spec: RunSpec, ascii: bool, slow_link: bool = False) -> int:
    """Train on a worker thread, show it until the user leaves, and return the exit status."""
    from tui_trainer.cli.screen import load_app, run_app_until_exit

    run_app = load_app()
    opened = InApp(spec)
    return run_app_until_exit(
        lambda: run_app(opened.session, ascii=ascii, slow_link=slow_link, ends_with_app=True),
        lambda: opened,
    )

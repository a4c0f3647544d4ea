"""`--in-app`: the training on a worker thread of the app itself, spoken to over a socketpair."""

from __future__ import annotations

import sys
from pathlib import Path

from tui_trainer.cli.directory import discard_refused
from tui_trainer.cli.errors import FAULT, USAGE
from tui_trainer.cli.farewell import last_told
from tui_trainer.cli.runs.common import number
from tui_trainer.config.spec import RunSpec
from tui_trainer.run.worker import Worker
from tui_trainer.session.live import LiveSession
from tui_trainer.session.stream import RunGone, Stream


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
        said = last_told(self._spec)
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
            f"{said.name} {said.state} at step {said.step:,}, loss {number(said.loss)}{reason} · "
            f"{self.directory}",
            flush=True,
        )
        return FAULT if said.state == "crashed" else 0


def show_in_app(spec: RunSpec, ascii: bool, slow_link: bool = False) -> int:
    """Train on a worker thread and show it until the user leaves; returns the exit status."""
    from tui_trainer.cli.screen import load_app, until_left

    run_app = load_app()
    opened = InApp(spec)
    return until_left(
        lambda: run_app(opened.session, ascii=ascii, slow_link=slow_link, ends_with_app=True),
        lambda: opened,
    )

"""A run on a worker thread of a process that also does something else, such as the app.

It ends with that process and does not handle its signals; otherwise it is like a run process.
"""

from __future__ import annotations

import socket
import threading

from tui_trainer.config.run_spec import RunSpec
from tui_trainer.run.host import Host
from tui_trainer.run.outcome import Outcome
from tui_trainer.run.signals import StopHandler


class WorkerStopHandler(StopHandler):
    """Leaves the process's signals and its main thread alone."""

    def install(self, task: bool, own_session: bool) -> None:
        """Set no handler."""

    def stop(self, checkpoint: bool) -> None:
        """Stop at the end of the current step, or of the first step if none has begun."""
        self._requests += 1
        self._request_stop(checkpoint)


class Worker:
    """Trains what `spec` describes. The run also listens on its socket, so that others can
    attach."""

    def __init__(self, spec: RunSpec) -> None:
        self._host = Host(spec, WorkerStopHandler)
        self.outcome: Outcome | None = None
        """How it ended; None until then."""
        self.viewer, served = socket.socketpair()
        self._host.open(None)
        self._host.server.serve(served)
        self._thread = threading.Thread(target=self._work, name="training", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        outcome = self._host.train()
        self._host.close(outcome)
        self.outcome = outcome

    def stop(self, checkpoint: bool = True) -> None:
        """Ask the training to stop after its current step."""
        self._host.stops.stop(checkpoint)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the run has ended and everything is written; returns whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

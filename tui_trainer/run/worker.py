"""A run on a worker thread of a process that also does something else: of an app, of a notebook.

It cannot outlive that process, nor can its signals be handled; all else is as in a run process.
"""

from __future__ import annotations

import socket
import threading

from tui_trainer.config.run_spec import RunSpec
from tui_trainer.run.host import Host
from tui_trainer.run.outcome import Outcome
from tui_trainer.run.signals import Signals


class WorkerSignals(Signals):
    """The process's signals, and its main thread, belong to somebody else."""

    def install(self, task: bool, own_session: bool) -> None:
        """No handler is set."""

    def stop(self, checkpoint: bool) -> None:
        """Stop at the end of the running step, or of the first one where there is none yet."""
        self._requests += 1
        self._ask(checkpoint)


class Worker:
    """Trains what `spec` describes; `viewer` is one end of a socketpair whose other end the run
    serves. The run listens on its socket besides, so that others can attach."""

    def __init__(self, spec: RunSpec) -> None:
        self._host = Host(spec, WorkerSignals)
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
        """Ask the training to end after its step."""
        self._host.signals.stop(checkpoint)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for its end, the records written; whether it has come."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

"""Signals that end a run: finish the step, leave a checkpoint, go.

A script may replace all of these handlers with its own, as it could without us.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from tui_trainer.run.outcome import INTERRUPTED, TERMINATED
from tui_trainer.trace.gate import Gate, Refusal, StopTraining

GRACE_S = 20.0
"""After a request to stop that no step boundary has answered, a script is interrupted …"""
GRACE_STEPS = 3.0
"""… or after so many times the longest of its recent steps, where that is more."""


class Signals:
    """What asks the run to stop, however it comes: a signal or a viewer's command."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.longest_step_s: Callable[[], float] = lambda: 0.0
        """The longest of the recent steps. Asked on a thread of ours."""
        self.say: Callable[[str], None] = lambda text: None
        """What people should know of an end that is forced."""
        self.exit_status: int | None = None
        """What the process leaves with when a signal has stopped it."""
        self._requests = 0
        self._over = False
        self._insists = False
        self._breaks_off = False
        """Whether the next SIGTERM is `_interrupt`'s."""

    @property
    def asked(self) -> bool:
        """Whether somebody has asked the run to stop."""
        return self._requests > 0

    def install(self, task: bool, own_session: bool) -> None:
        """On the main thread. A task finishes its step on Ctrl-C; a script has Python's own
        `KeyboardInterrupt`. A process with its own session does not mind a hang-up; for one that
        stands or falls with its terminal it is a request to end (not under nohup)."""
        self._insists = not task
        signal.signal(signal.SIGTERM, self._on_terminate)
        if own_session:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        elif signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, self._on_terminate)
        # Started in the background (`&`, nohup) it is ignored, and stays so; but what was started
        # there with a session of its own is in nobody's background.
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if task and (own_session or not ignored):
            signal.signal(signal.SIGINT, self._on_interrupt)
        elif own_session and ignored:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop(self, checkpoint: bool) -> None:
        """Stop at the end of the running step. When there is none yet, or when asked a second
        time, at once, as Ctrl-C would."""
        self._requests += 1
        waits_for_a_step = self._ask(checkpoint)
        if self._over:
            return
        if not waits_for_a_step or self._requests > 1:
            self._interrupt()
        else:
            self._insist_later()

    def over(self) -> None:
        """The training has ended: nothing is to be interrupted any more."""
        self._over = True

    def _ask(self, checkpoint: bool) -> bool:
        try:
            self._gate.stop(checkpoint)
        except Refusal:
            return False
        return bool(self._gate.phase)

    def _insist_later(self) -> None:
        """A script may have made its last step long ago: then no boundary will come. A task's loop
        always comes to one, however long the step or an evaluation takes, and is waited for."""
        if self._insists:
            self._insist_after(GRACE_S, 0.0)

    def _insist_after(self, seconds: float, waited: float) -> None:
        timer = threading.Timer(seconds, self._insist, (self._gate.completed, waited + seconds))
        timer.daemon = True
        timer.start()

    def _insist(self, step: int, waited: float) -> None:
        if self._over or self._gate.mode != "stopping":
            return
        if self._gate.in_gate or self._gate.completed != step:  # about to end by itself
            self._insist_after(GRACE_S, 0.0)
            return
        patience = GRACE_STEPS * self.longest_step_s()
        if waited < patience:
            self._insist_after(patience - waited, waited)
            return
        lost = ", so no checkpoint is written" if self._gate.checkpoint_on_stop else ""
        self.say(f"no step has ended in {waited:.3g} s: the script is interrupted{lost}")
        self._interrupt()

    def _interrupt(self) -> None:
        """As Ctrl-C would; where that is ignored, by the signal that is ours, if it still is."""
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            _send(signal.SIGINT)
        elif signal.getsignal(signal.SIGTERM) == self._on_terminate:
            self._breaks_off = True
            _send(signal.SIGTERM)
        else:
            self.say("the script ignores SIGINT and takes SIGTERM itself: it is not interrupted")

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        if self._breaks_off and number == signal.SIGTERM:
            self._breaks_off = False
            raise KeyboardInterrupt
        self.exit_status = TERMINATED if number == signal.SIGTERM else 128 + number
        self._from_signal()

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._gate.mode == "stopping" and self._requests and self.exit_status is None:
            raise StopTraining  # a viewer's second request
        self.exit_status = self.exit_status or INTERRUPTED
        if not self._requests:
            with contextlib.suppress(OSError):  # `print` may be what the signal has interrupted
                os.write(2, b"\nfinishing the step; Ctrl-C again breaks it off\n")
        self._from_signal()

    def _from_signal(self) -> None:
        """On the main thread, wherever it is."""
        self._requests += 1
        waits_for_a_step = self._ask(checkpoint=True)
        if self._over:
            return
        if not waits_for_a_step or self._requests > 1:
            raise StopTraining
        self._insist_later()


def _send(number: int) -> None:
    """A real signal, which wakes a main thread that sleeps or waits in C."""
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, number)

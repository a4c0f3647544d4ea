"""Stops a run on request: on SIGTERM, SIGHUP, Ctrl-C or a viewer's command.

The current step is finished and a checkpoint is written first. A script may replace these signal
handlers with its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import weakref
from collections.abc import Callable
from types import FrameType

from tui_trainer.protocol.formatting import long_duration
from tui_trainer.run.outcome import INTERRUPTED, TERMINATED
from tui_trainer.trace.gate import Gate, Refusal, StopTraining

GRACE_S = 20.0
"""How long a script that was asked to stop may take to reach the end of a step …"""
GRACE_STEPS = 3.0
"""… or this many times its longest recent step, if that is more; then it is interrupted."""

DEFAULTS: dict[signal.Signals, Callable[[int, FrameType | None], None] | signal.Handlers] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}
"""Handlers of a Python program that sets none."""


class StopHandler:
    """Handles requests to stop, from signals and from viewers' commands."""

    def __init__(
        self,
        gate: Gate,
        longest_step_s: Callable[[], float] = lambda: 0.0,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`longest_step_s()`: the longest recent step; `warn(text)` warns the user of an
        interrupted script. Both are called on a timer's thread."""
        self._gate = gate
        self._longest_step_s = longest_step_s
        self._warn = warn
        self.stop_gate: Callable[[bool], None] = gate.stop
        """Requests a stop of all processes of the run, with or without a checkpoint."""
        self.exit_status: int | None = None
        """Exit status of the process once a signal has stopped it."""
        self._requests = 0
        self._training_ended = False
        self._is_script = False
        self._sigterm_interrupts = False
        """Whether the next SIGTERM was sent by `_interrupt`."""
        self._before_fork = threading.local()

    @property
    def requested(self) -> bool:
        """Whether a stop was requested."""
        return self._requests > 0

    def install(self, task: bool, own_session: bool) -> None:
        """Set the signal handlers; call it on the main thread.

        A task finishes its step on Ctrl-C; a script gets Python's `KeyboardInterrupt`. SIGHUP is
        ignored by a process with its own session; otherwise it stops the run, except under nohup.
        """
        self._is_script = not task
        signal.signal(signal.SIGTERM, self._on_terminate)
        if own_session:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        elif signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, self._on_terminate)
        # A shell's background job (`&`, nohup) inherits an ignored SIGINT, which stays ignored. A
        # process with its own session was not started by a shell, even if it inherited this.
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if task and (own_session or not ignored):
            signal.signal(signal.SIGINT, self._on_interrupt)
        elif own_session and ignored:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        reference = weakref.ref(self)
        os.register_at_fork(
            before=lambda: _call(reference(), StopHandler._block_signals),
            after_in_parent=lambda: _call(reference(), StopHandler._unblock_signals),
            after_in_child=lambda: _call(reference(), StopHandler._reset_signals),
        )

    def _block_signals(self) -> None:
        """Block signals during a fork. Python drops signals that reach a forked child before its
        interpreter is ready; without our handlers they would have ended the child, so they wait
        until `_reset_signals`."""
        ours = [number for number in DEFAULTS if self._handles(number)]
        self._before_fork.handled = ours
        self._before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, ours)

    def _unblock_signals(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before_fork.mask)

    def _reset_signals(self) -> None:
        """Restore, in a forked child, the handlers that it would have without us."""
        try:
            for number in self._before_fork.handled:
                signal.signal(number, DEFAULTS[number])
        finally:
            self._unblock_signals()

    def _handles(self, number: signal.Signals) -> bool:
        return signal.getsignal(number) in (self._on_terminate, self._on_interrupt)

    def stop(self, checkpoint: bool) -> None:
        """Stop at the end of the current step. Before the first step, and on a second request,
        interrupt the main thread instead, as Ctrl-C would."""
        self._requests += 1
        in_step = self._request_stop(checkpoint)
        if self._training_ended:
            return
        if not in_step or self._requests > 1:
            self._interrupt()
        else:
            self._start_grace_period()

    def training_ended(self) -> None:
        """Interrupt nothing from now on."""
        self._training_ended = True

    def _request_stop(self, checkpoint: bool) -> bool:
        """Ask the gate to stop; returns whether the end of a step can be expected."""
        try:
            self.stop_gate(checkpoint)
        except Refusal:
            return False
        return bool(self._gate.phase)

    def _start_grace_period(self) -> None:
        """Start to watch a script, which may have made its last step and never reach the gate
        again. A task's loop always reaches it, however long a step or an evaluation takes."""
        if self._is_script:
            self._check_again(GRACE_S, 0.0)

    def _check_again(self, seconds: float, waited: float) -> None:
        timer = threading.Timer(seconds, self._check, (self._gate.completed, waited + seconds))
        timer.daemon = True
        timer.start()

    def _check(self, step: int, waited: float) -> None:
        """Interrupt a script that has completed no step since `step` for too long. `waited`: for
        how many seconds."""
        if self._training_ended or self._gate.mode != "stopping":
            return
        if self._gate.in_gate or self._gate.completed != step:  # the script will stop by itself
            self._check_again(GRACE_S, 0.0)
            return
        grace = GRACE_STEPS * self._longest_step_s()
        if waited < grace:
            self._check_again(grace - waited, waited)
            return
        lost = ", so no checkpoint is written" if self._gate.checkpoint_on_stop else ""
        self._warn(f"no step has ended in {long_duration(waited)}: the script is interrupted{lost}")
        self._interrupt()

    def _interrupt(self) -> None:
        """Interrupt as Ctrl-C does, by SIGTERM where SIGINT is ignored and SIGTERM still ours."""
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            _send_to_main_thread(signal.SIGINT)
        elif signal.getsignal(signal.SIGTERM) == self._on_terminate:
            self._sigterm_interrupts = True
            _send_to_main_thread(signal.SIGTERM)
        else:
            self._warn("the script ignores SIGINT and handles SIGTERM: it is not interrupted")

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        if self._sigterm_interrupts and number == signal.SIGTERM:
            self._sigterm_interrupts = False
            raise KeyboardInterrupt
        self.exit_status = TERMINATED if number == signal.SIGTERM else 128 + number
        self._stop_from_signal()

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._gate.mode == "stopping" and self._requests and self.exit_status is None:
            raise StopTraining  # a viewer's second request
        self.exit_status = self.exit_status or INTERRUPTED
        if not self._requests:
            with contextlib.suppress(OSError):  # not `print`, which the signal may have interrupted
                os.write(2, b"\nfinishing the step; press Ctrl-C again to abort it\n")
        self._stop_from_signal()

    def _stop_from_signal(self) -> None:
        """Called on the main thread, which may be anywhere."""
        self._requests += 1
        in_step = self._request_stop(checkpoint=True)
        if self._training_ended:
            return
        if not in_step or self._requests > 1:
            raise StopTraining
        self._start_grace_period()


def _call(handler: StopHandler | None, method: Callable[[StopHandler], None]) -> None:
    if handler is not None:
        method(handler)


def _send_to_main_thread(number: int) -> None:
    """Send a real signal, which wakes a main thread that sleeps or waits in C."""
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, number)

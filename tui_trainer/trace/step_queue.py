"""Completed steps and skipped iterations that are not recorded yet."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

from tui_trainer.trace.transfer import HostTransfer, Transfers

RECORD_EVERY_S = 0.25
BATCH = 16
"""Steps are recorded in batches of this many or after this time: recording costs a third when its
code is still in the processor's caches, which every forward and backward empties."""
MAX_IN_FLIGHT = 32
"""Steps on their way to the host before the training thread waits for the oldest."""
IDLE_S = 0.3
"""Time without a new step after which another thread records those that wait."""


class Queued(Protocol):
    """A step or an iteration with values on their way to the host."""

    @property
    def transfer(self) -> HostTransfer | Transfers: ...


class StepRecorder(Protocol):
    """Records what is queued (`StepMeasurer`)."""

    def record(self, step: Any) -> float:
        """Record a step whose values have arrived; returns the seconds spent in probes, which
        account for their own cost."""


class StepQueue:
    """Batches the completed steps of all optimizers and records them in order.

    The training thread puts and drains; one other thread may call `drain_idle`. The lock is held
    while a step is recorded, and not while one is put that waits for its batch.
    """

    def __init__(self, on_fault: Callable[[str, Exception], None]) -> None:
        """`on_fault(where, exception)` is called where a step cannot be recorded."""
        self._on_fault = on_fault
        self._steps: deque[tuple[StepRecorder, Queued]] = deque()
        self._recording = threading.Lock()
        self._last_put = 0.0
        self._last_drain = 0.0
        self._accounted_s = 0.0

    def put(self, recorder: StepRecorder, step: Queued, at_once: bool) -> None:
        """Add a step. `at_once`: record what has arrived, since the run may pause next."""
        self._steps.append((recorder, step))
        now = self._last_put = perf_counter()
        if at_once or len(self._steps) >= BATCH or now - self._last_drain > RECORD_EVERY_S:
            self._last_drain = now
            self.drain(wait=len(self._steps) > MAX_IN_FLIGHT)

    def drain(self, wait: bool = False, everything: bool = False) -> None:
        """Record the steps whose values have arrived; `wait` for the oldest, or for
        `everything`."""
        with self._recording:
            while self._steps and self._steps[0][1].transfer.arrived(wait or everything):
                wait = False
                recorder, step = self._steps.popleft()
                self._accounted_s += self._record(recorder, step)

    def drain_idle(self) -> None:
        """From another thread: record what has arrived where the training thread has put nothing
        for a while. It gets the lock after each step."""
        while self._steps and perf_counter() - self._last_put > IDLE_S:
            with self._recording:
                if not self._steps or not self._steps[0][1].transfer.arrived_on_host():
                    return
                recorder, step = self._steps.popleft()
                self._record(recorder, step)

    def _record(self, recorder: StepRecorder, step: Queued) -> float:
        try:
            return recorder.record(step)
        except Exception as fault:
            self._on_fault("a step is not recorded", fault)
            return 0.0

    def take_accounted_s(self) -> float:
        """Seconds of recording that probes account for, since the last call."""
        seconds, self._accounted_s = self._accounted_s, 0.0
        return seconds

    def reset_after_fork(self) -> None:
        """Reset in a forked child: the steps are the parent's, and the lock may be held forever."""
        self._recording = threading.Lock()
        self._steps.clear()

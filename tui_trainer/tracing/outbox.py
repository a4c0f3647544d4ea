"""Steps that are made but not recorded yet: on their way to the host, or waiting for company."""

from __future__ import annotations

import threading
from collections import deque
from time import perf_counter
from typing import Protocol

from tui_trainer.tracing.readout import Arrival

RECORD_EVERY_S = 0.25
AT_ONCE = 16
"""Steps are recorded together, so many or so often: the host's part of it costs a third when its
code is still in the processor's caches, which every forward and backward empties."""
MOST = 32
"""Steps that may be under way to the host before we wait for the oldest."""
NO_STEP_FOR_S = 0.3
"""When no step has come for so long, those that wait are recorded by another thread: the next may
be long in coming."""


class Step(Protocol):
    """A step whose values are under way."""

    arrival: Arrival

    def record(self) -> float:
        """Make its rows and record them, once they have arrived; returns the seconds of ours that
        are on some probe's account already."""


class Outbox:
    """The steps of all optimizers, recorded in the order in which they were made.

    The training thread puts and drains; `drain_meanwhile` is for one other. A lock is held while a
    step is recorded, and none while one is put that waits for company.
    """

    def __init__(self) -> None:
        self._steps: deque[Step] = deque()
        self._recording = threading.Lock()
        self._put = 0.0
        self._drained = 0.0
        self._accounted_s = 0.0

    def put(self, step: Step, at_once: bool) -> None:
        """Take a step. `at_once`: record what has arrived, since somebody may look."""
        self._steps.append(step)
        now = self._put = perf_counter()
        if at_once or len(self._steps) >= AT_ONCE or now - self._drained > RECORD_EVERY_S:
            self._drained = now
            self.drain(wait=len(self._steps) > MOST)

    def drain(self, wait: bool = False, everything: bool = False) -> None:
        """Record the steps whose values are here; `wait` for the oldest, or for `everything`."""
        with self._recording:
            while self._steps and self._steps[0].arrival.arrived(wait or everything):
                wait = False
                self._accounted_s += self._steps.popleft().record()

    def drain_meanwhile(self) -> None:
        """From another thread: record what has arrived, where the training thread has put nothing
        for a while. It gets its turn after each step."""
        while self._steps and perf_counter() - self._put > NO_STEP_FOR_S:
            with self._recording:
                if not self._steps or not self._steps[0].arrival.landed():
                    return
                self._steps.popleft().record()

    def take_accounted_s(self) -> float:
        """Seconds of recording that are on some probe's account, since the last call."""
        seconds, self._accounted_s = self._accounted_s, 0.0
        return seconds

    def forget_parent(self) -> None:
        """In a forked child: the steps are the parent's, and the lock may be held for ever."""
        self._recording = threading.Lock()
        self._steps.clear()

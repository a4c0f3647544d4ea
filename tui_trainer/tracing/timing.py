"""How long each phase of a step took: the host's clock on a CPU, events on a CUDA device.

Events are recorded into the stream and read a step or more later, when they have long passed, so
that timing never makes the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

from tui_trainer.protocol import PHASES

OUTSIDE = len(PHASES)
"""What belongs to no phase: our own work, evaluations, what a script does between two phases."""
Times = Callable[[], list[float]]
"""Gives the milliseconds of each phase; to be called once the step's values have arrived."""


class HostClock:
    """Self time of each phase on the host's clock, summed within a step."""

    def __init__(self) -> None:
        self._totals = [0.0] * (OUTSIDE + 1)
        self._current = OUTSIDE
        self._since = perf_counter()

    def switch(self, phase: int) -> None:
        """The present phase ends here and `phase` (an index into PHASES, or OUTSIDE) begins."""
        now = perf_counter()
        self._totals[self._current] += now - self._since
        self._since = now
        self._current = phase

    def relabel(self, phase: int) -> None:
        """What has run since the last switch turns out to have been `phase`."""
        self._current = phase

    def total_ms(self, phase: int) -> float:
        """What a phase has taken in this step so far."""
        return self._totals[phase] * 1e3

    def take(self) -> Times:
        """The times of the step that ends here; the next one starts from nothing."""
        taken = [seconds * 1e3 for seconds in self._totals]
        del taken[OUTSIDE:]
        self._totals = [0.0] * (OUTSIDE + 1)
        return lambda: taken


class CudaClock:
    """The same on the device's clock, by events from a pool."""

    def __init__(self) -> None:
        self._pool: list[torch.cuda.Event] = []
        self._current = OUTSIDE
        self._start: torch.cuda.Event | None = None
        self._spans: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
        self._events: list[torch.cuda.Event] = []

    def switch(self, phase: int) -> None:
        """The present phase ends here in the stream and `phase` begins."""
        if phase == self._current == OUTSIDE:
            return
        event = self._pool.pop() if self._pool else _timing_event()
        event.record()
        self._events.append(event)
        if self._current != OUTSIDE and self._start is not None:
            self._spans.append((self._current, self._start, event))
        self._start = event
        self._current = phase

    def relabel(self, phase: int) -> None:
        """What has run since the last switch turns out to have been `phase`."""
        self._current = phase

    def total_ms(self, phase: int) -> float:
        """What a phase has taken in this step so far. Waits for the device: only while stopped."""
        torch.cuda.current_stream().synchronize()
        return float(sum(a.elapsed_time(b) for p, a, b in self._spans if p == phase))

    def take(self) -> Times:
        """The times of the step that ends here, readable once the stream has come this far."""
        spans, self._spans = self._spans, []
        used, self._events = self._events, []
        if self._start is not None and used and used[-1] is self._start:
            self._events.append(used.pop())  # it also begins the next step's first phase

        taken: list[float] = []

        def times() -> list[float]:
            if taken:  # asked again
                return taken
            taken.extend([0.0] * OUTSIDE)
            for phase, start, end in spans:
                taken[phase] += start.elapsed_time(end)
            self._pool.extend(used)
            return taken

        return times


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


Clock = HostClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    """The clock that can time work on `device`."""
    return CudaClock() if device.type == "cuda" else HostClock()

"""The clocks that fill table `phase_ms`: on the host, and on CUDA by events in its stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter

import torch

from tui_trainer.protocol import BETWEEN, PHASES

DATA, ZERO_GRAD, FORWARD, LOSS, BACKWARD, CLIP, STEP = range(len(PHASES))
EVAL, CHECKPOINT, TRACING, OTHER = range(len(PHASES), len(PHASES) + len(BETWEEN))
COLUMNS = len(PHASES) + len(BETWEEN)

PhaseTimes = Callable[[], list[float]]
"""Returns the milliseconds of each column of table `phase_ms`, absent for a phase that the step did
not have; to be called once the step's values have arrived."""


class HostClock:
    """Self time of each phase, and of what lies between, on the host's clock."""

    def __init__(self) -> None:
        self._totals = [0.0] * COLUMNS
        self.current = TRACING
        self._since = perf_counter()
        self._gap = (OTHER, 0.0)
        """(column, seconds) of the time before the open phase."""
        self.gap_began = self._since
        """When the time before the open phase began."""

    def switch(self, phase: int) -> float:
        """End the current phase and begin `phase`, or another column of table `phase_ms`; returns
        the present time."""
        now = perf_counter()
        self._totals[self.current] += now - self._since
        self._since = now
        self.current = phase
        return now

    def end_gap(self) -> float:
        """A phase is open: close the gap before it and count our preparations for it as `tracing`;
        returns the present time."""
        now = perf_counter()
        self._gap = (self.current, now - self._since)
        self.gap_began = self._since
        self._totals[self.current] += now - self._since
        self._since = now
        self.current = TRACING
        return now

    def relabel(self, phase: int) -> None:
        """Count the time since the last switch as `phase`."""
        self.current = phase

    def relabel_gap(self, phase: int) -> None:
        """Count the time before the open phase as `phase`."""
        before, seconds = self._gap
        self._totals[before] -= seconds
        self._totals[phase] += seconds
        self._gap = (phase, 0.0)

    def discount(self, seconds: float) -> None:
        """Leave `seconds` in the gate or in excluded work out of the time of `tracing`."""
        self._totals[TRACING] -= seconds

    def total_ms(self, phase: int) -> float:
        """Time of a phase in this step so far."""
        return self._totals[phase] * 1e3

    def take(self) -> PhaseTimes:
        """The times of the step that ends here; the next one starts at zero."""
        totals, self._totals = self._totals, [0.0] * COLUMNS
        return lambda: [seconds * 1e3 for seconds in totals]

    def mark(self) -> list[float]:
        """The totals at the end of the phase before the open one, for `take_until`."""
        totals, (gap, seconds) = list(self._totals), self._gap
        totals[gap] -= seconds
        return totals

    def take_until(self, mark: list[float]) -> PhaseTimes:
        """The times of an iteration that ended at `mark`; later times are kept for the next one."""
        self._totals = [now - then for now, then in zip(self._totals, mark, strict=True)]
        times = [seconds * 1e3 for seconds in mark]
        return lambda: times

    def take_phase(self, phase: int) -> PhaseTimes:
        """Take the time of one phase out of this step, to which it does not belong."""
        times = [0.0] * COLUMNS
        times[phase] = self._totals[phase] * 1e3
        self._totals[phase] = 0.0
        return lambda: times


class CudaClock:
    """A clock on the device.

    Events are recorded into the stream and read a step or more later, when they have passed, so
    that timing never makes the host wait for the device. Our own time on the host is not time of
    the device.
    """

    def __init__(self) -> None:
        self._pool: list[torch.cuda.Event] = []
        self.current = OTHER
        self._start: torch.cuda.Event | None = None
        self._spans: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []
        self._events: list[torch.cuda.Event] = []

    def switch(self, phase: int) -> float:
        """End the current phase in the stream and begin `phase`; returns the host's time."""
        if phase >= TRACING and self.current >= TRACING:
            return perf_counter()
        event = self._pool.pop() if self._pool else _timing_event()
        event.record()
        self._events.append(event)
        if self.current < TRACING and self._start is not None:
            self._spans.append((self.current, self._start, event))
        self._start = event
        self.current = phase
        return perf_counter()

    def relabel(self, phase: int) -> None:
        """Count the time since the last switch as `phase`."""
        self.current = phase

    def end_gap(self) -> float:
        """A phase is open: the gap ends when the time of the phase begins. Returns the present
        time."""
        return perf_counter()

    def relabel_gap(self, phase: int) -> None:
        self.current = phase

    def discount(self, seconds: float) -> None:
        pass

    def total_ms(self, phase: int) -> float:
        """Time of a phase in this step so far. Waits for the device: only while paused."""
        torch.cuda.current_stream().synchronize()
        return float(sum(a.elapsed_time(b) for p, a, b in self._spans if p == phase))

    def take(self) -> PhaseTimes:
        """The times of the step that ends here, readable once the stream has come this far."""
        spans, self._spans = self._spans, []
        used, self._events = self._events, []
        if self._start is not None and used and used[-1] is self._start:
            self._events.append(used.pop())  # it also begins the next step's first phase
        return self._reader(spans, used)

    @property
    def gap_began(self) -> float:
        """The present time: gaps are not timed on the host."""
        return perf_counter()

    def mark(self) -> int:
        """The number of spans so far, for `take_until`."""
        return len(self._spans)

    def take_until(self, mark: int) -> PhaseTimes:
        """The times of an iteration that ended at `mark`; later times are kept for the next one."""
        spans, self._spans = self._spans[:mark], self._spans[mark:]
        return self._reader(spans, [])

    def take_phase(self, phase: int) -> PhaseTimes:
        """Take the time of one phase out of this step, to which it does not belong."""
        spans = [span for span in self._spans if span[0] == phase]
        self._spans = [span for span in self._spans if span[0] != phase]
        return self._reader(spans, [])

    def _reader(
        self,
        spans: list[tuple[int, torch.cuda.Event, torch.cuda.Event]],
        used: list[torch.cuda.Event],
    ) -> PhaseTimes:
        times: list[float] = []

        def read() -> list[float]:
            if not times:
                times.extend([0.0] * OTHER)
                times.append(math.nan)  # what the device did between the phases is not measured
                for phase, start, end in spans:
                    times[phase] += start.elapsed_time(end)
                self._pool.extend(used)
            return times

        return read


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

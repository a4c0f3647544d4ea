"""Moves one step's readings to the host in one copy per device, and queues completed steps until
their values have arrived.

On the CPU they have arrived at once. On an accelerator the copy goes into pinned memory without
waiting, and an event later signals that it is complete.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch

from tui_trainer.trace.probe import Readings, Values

NO_VALUES: Values = np.empty(0)
UNWRITTEN = -7.1623e-133
"""Written to the end of pinned memory before a copy, which overwrites it."""
MAX_AS_LIST = 64
"""Number of elements of a tensor up to which a list is faster than a concatenated tensor."""
SETTLE_S = 0.02
"""Time after which a copy whose end has arrived is complete: the rest takes microseconds."""


def flattened(readings: Sequence[torch.Tensor]) -> torch.Tensor:
    """0-d and 1-d tensors of one device as one float64 vector, in order."""
    pieces: list[torch.Tensor] = []
    scalars: list[torch.Tensor] = []
    for reading in readings:
        if reading.dim() == 0:
            scalars.append(reading)
            continue
        if scalars:
            pieces.append(torch.stack(scalars))
            scalars = []
        pieces.append(reading)
    if scalars:
        pieces.append(torch.stack(scalars))
    if len(pieces) == 1:
        return pieces[0].to(_widest(pieces[0]))
    return torch.cat([piece.to(_widest(piece)) for piece in pieces])


def _widest(tensor: torch.Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


TransferPart = tuple[Readings, bool]
"""Readings of one probe, or of the header, and whether no other code writes to them (see
`Probe.owns_readings`)."""


class HostTransfer:
    """One step's readings on their way to the host.

    `on_host`: readings of parts with `owns_readings` are known to be on the CPU already.
    """

    def __init__(self, parts: Sequence[TransferPart], on_host: bool) -> None:
        self._parts = parts
        self._values: list[list[float] | None] | None = None
        self._copies: list[tuple[list[tuple[int, int]], torch.Tensor]] = []
        self._events: list[torch.cuda.Event] = []
        self._pinned: list[Values] = []
        self._numbers: list[tuple[int, float]] = []
        """(position, number) of readings that were on the host already."""
        self._end_seen_at = 0.0
        for readings, owned in parts:
            if not (owned and on_host):
                for reading in readings:
                    if isinstance(reading, torch.Tensor) and not reading.is_cpu:
                        self._send()
                        return
        # Tensors that no other code overwrites are read later, those of many steps at once, when
        # the code that reads them is in the processor's caches.
        self._values = [None if owned else _read_on_host(readings) for readings, owned in parts]

    def _send(self) -> None:
        """Start one copy per device."""
        by_device: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
        position = 0
        for readings, _ in self._parts:
            for reading in readings:
                if isinstance(reading, torch.Tensor):
                    by_device.setdefault(reading.device, []).append((position, reading))
                    position += reading.numel()
                else:
                    self._numbers.append((position, reading))
                    position += 1
        for device, placed in by_device.items():
            vector = flattened([reading for _, reading in placed])
            spans = [(start, reading.numel()) for start, reading in placed]
            self._copies.append((spans, self._copy(device, vector)))
        self._sizes = [length_of(readings) for readings, _ in self._parts]
        self._parts = ()

    def _copy(self, device: torch.device, vector: torch.Tensor) -> torch.Tensor:
        if device.type == "cpu":
            return vector.clone()
        if device.type != "cuda":
            return vector.cpu()  # other devices have no events that signal when a copy has arrived
        with torch.cuda.device(device):
            host = torch.empty(vector.shape, dtype=vector.dtype, device="cpu", pin_memory=True)
            pinned = host.numpy()
            pinned[-1:] = UNWRITTEN
            host.copy_(vector, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._events.append(event)
        self._pinned.append(pinned)
        return host

    def arrived(self, wait: bool = False) -> bool:
        """Whether everything is on the host; with `wait`, wait for it. Training thread only."""
        for event in self._events:
            if wait:
                event.synchronize()
            elif not event.query():  # type: ignore[no-untyped-call]
                return False
        return True

    def arrived_on_host(self) -> bool:
        """Like `arrived`, for any thread, and True a little later.

        Reads the memory, not the events: while one thread captures a CUDA graph, a query of an
        event by another would break the capture.
        """
        if any(pinned.size and pinned[-1] == UNWRITTEN for pinned in self._pinned):
            return False
        if not self._pinned:
            return True
        now = perf_counter()
        self._end_seen_at = self._end_seen_at or now
        return now - self._end_seen_at >= SETTLE_S

    def values(self) -> list[Values]:
        """The values of each part, flattened; only once they have arrived."""
        found: list[Values] = []
        for part in self.parts():
            if isinstance(part, Exception):
                raise part
            found.append(part)
        return found

    def parts(self) -> Sequence[Values | Exception]:
        """Like `values`, with an exception in place of a part that cannot be read."""
        if self._values is not None:
            found: list[Values | Exception] = []
            for (readings, _), values in zip(self._parts, self._values, strict=True):
                try:
                    found.append(_vector(readings if values is None else values))
                except Exception as fault:
                    found.append(fault)
            return found
        flat = np.empty(sum(self._sizes))
        for position, number in self._numbers:
            flat[position] = number
        for spans, host in self._copies:
            source, offset = host.numpy(), 0
            for start, count in spans:
                flat[start : start + count] = source[offset : offset + count]
                offset += count
        return np.split(flat, np.cumsum(self._sizes)[:-1])


class Transfers:
    """Several transfers as one."""

    def __init__(self, parts: Sequence[HostTransfer]) -> None:
        self._parts = parts

    def arrived(self, wait: bool = False) -> bool:
        return all(part.arrived(wait) for part in self._parts)

    def arrived_on_host(self) -> bool:
        return all(part.arrived_on_host() for part in self._parts)


def length_of(readings: Readings) -> int:
    """Number of values in all readings."""
    return sum(r.numel() if isinstance(r, torch.Tensor) else 1 for r in readings)


def _read_on_host(readings: Readings) -> list[float]:
    """Values on the CPU: `item()` waits for nothing here and takes half as long as stacking."""
    values: list[float] = []
    for reading in readings:
        if not isinstance(reading, torch.Tensor):
            values.append(reading)
        elif reading.dim():
            values += reading.tolist()
        else:
            values.append(reading.item())
    return values


def _vector(readings: Readings | list[float]) -> Values:
    if not readings:
        return NO_VALUES
    first = readings[0]
    if isinstance(readings, list) and len(readings) > 1 and isinstance(first, float):
        return np.array(readings, dtype=np.float64)
    if isinstance(first, torch.Tensor) and first.dim() == 1 and first.is_cpu:
        if len(readings) == 1:
            return first.to(torch.float64).numpy()
        if first.numel() > MAX_AS_LIST:
            return flattened([torch.as_tensor(r) for r in readings]).numpy()
    return np.array(_read_on_host(readings), dtype=np.float64)


RECORD_EVERY_S = 0.25
BATCH = 16
"""Steps are recorded in batches of this many, or after RECORD_EVERY_S: recording costs a third
while its code is still in the processor's caches, which every forward and backward empties."""
MAX_IN_FLIGHT = 32
"""Maximum number of steps on their way to the host; beyond it the training thread waits for the
oldest."""
IDLE_S = 0.3
"""Time without a new step after which another thread records the waiting ones."""


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
    while steps are recorded, and not while a step is only added to its batch.
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
        """Record what has arrived where the training thread has put nothing for a while. Called by
        another thread, which releases the lock after each step."""
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
        """Seconds of recording since the last call that probes account for."""
        seconds, self._accounted_s = self._accounted_s, 0.0
        return seconds

    def reset_after_fork(self) -> None:
        """Reset in a forked child: the steps are the parent's, and the lock may be held forever."""
        self._recording = threading.Lock()
        self._steps.clear()

"""All of a step's readings, from wherever they were computed to the host, in one copy per device.

On the CPU they are there at once. On an accelerator the copy goes into pinned memory without
waiting, and an event says later that it has arrived.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple, Protocol

import numpy as np
import torch

from tui_trainer.history.buckets import Floats

UNWRITTEN = np.float32(-7.1623e-33)
"""Stands at the end of pinned memory until a copy has overwritten it."""
SETTLED_S = 0.02
"""So long after its end was seen the whole of a copy is surely there: it takes microseconds."""


def flattened(readings: Sequence[torch.Tensor]) -> torch.Tensor:
    """0-d and 1-d tensors of one device as one float32 vector, in order."""
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
        return pieces[0].to(torch.float32)
    return torch.cat([piece.to(torch.float32) for piece in pieces])


class TransferPart(NamedTuple):
    """Readings that belong together."""

    readings: Sequence[torch.Tensor]
    owns_readings: bool
    """See `Probe.owns_readings`."""


class HostTransfer:
    """One step's readings on their way to the host."""

    def __init__(self, parts: Sequence[TransferPart], on_host: bool) -> None:
        self._parts = parts
        self._values: list[list[float] | None] | None = None
        self._copies: list[tuple[list[tuple[int, int]], torch.Tensor]] = []
        self._events: list[torch.cuda.Event] = []
        self._landings: list[Floats] = []
        self._seen_at = 0.0
        for part in parts:
            if not (part.owns_readings and on_host):
                for reading in part.readings:
                    if not reading.is_cpu:
                        self._send()
                        return
        # What nobody writes to is fetched later, many steps at once, and not by numpy yet: its code
        # has been driven out of the processor's caches.
        self._values = [None if part.owns_readings else _on_host(part.readings) for part in parts]

    def _send(self) -> None:
        """One vector per device, copied without waiting."""
        by_device: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
        position = 0
        for part in self._parts:
            for reading in part.readings:
                by_device.setdefault(reading.device, []).append((position, reading))
                position += reading.numel()
        for device, placed in by_device.items():
            vector = flattened([reading for _, reading in placed])
            spans = [(start, reading.numel()) for start, reading in placed]
            self._copies.append((spans, self._fetch(device, vector)))
        self._sizes = [sum(reading.numel() for reading in part.readings) for part in self._parts]
        self._parts = ()

    def _fetch(self, device: torch.device, vector: torch.Tensor) -> torch.Tensor:
        if device.type == "cpu":
            return vector.clone()
        if device.type != "cuda":
            return vector.cpu()  # no events on other devices that could tell of an arrival
        with torch.cuda.device(device):
            host = torch.empty(vector.shape, dtype=vector.dtype, device="cpu", pin_memory=True)
            landing = host.numpy()
            landing[-1:] = UNWRITTEN
            host.copy_(vector, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._events.append(event)
        self._landings.append(landing)
        return host

    def arrived(self, wait: bool = False) -> bool:
        """Whether all is on the host; `wait` until it is."""
        for event in self._events:
            if wait:
                event.synchronize()
            elif not event.query():  # type: ignore[no-untyped-call]
                return False
        return True

    def landed(self) -> bool:
        """The same, asked by another thread than the one that trains, and a little later.

        It looks at the memory and not at the events: while one thread captures a CUDA graph, a
        query by any other would break the capture.
        """
        if any(landing.size and landing[-1] == UNWRITTEN for landing in self._landings):
            return False
        if not self._landings:
            return True
        now = perf_counter()
        self._seen_at = self._seen_at or now
        return now - self._seen_at >= SETTLED_S

    def values(self) -> list[Floats]:
        """The values of each part, flattened. Only when `arrived`."""
        if self._values is not None:
            return [
                _vector(part.readings if values is None else values)
                for part, values in zip(self._parts, self._values, strict=True)
            ]
        flat = np.empty(sum(self._sizes), dtype=np.float32)
        for spans, host in self._copies:
            source, offset = host.numpy(), 0
            for start, count in spans:
                flat[start : start + count] = source[offset : offset + count]
                offset += count
        return np.split(flat, np.cumsum(self._sizes)[:-1])


def _on_host(readings: Sequence[torch.Tensor]) -> list[float]:
    """Readings that are on the host already.

    Here `item()` waits for nothing, and takes half as long as stacking.
    """
    values: list[float] = []
    for reading in readings:
        if reading.dim():
            values += reading.tolist()
        else:
            values.append(reading.item())
    return values


def _vector(readings: Sequence[torch.Tensor] | Sequence[float]) -> Floats:
    first = readings[0] if readings else None
    if isinstance(first, torch.Tensor):
        if len(readings) == 1 and first.dim() == 1 and first.is_cpu:
            return first.to(torch.float32).numpy()
        readings = _on_host(readings)  # type: ignore[arg-type]
    return np.array(readings, dtype=np.float32)


# ---- outbox
# Steps that are made but not recorded yet: on their way to the host, or waiting for company.


RECORD_EVERY_S = 0.25
AT_ONCE = 16
"""Steps are recorded together, so many or so often: the host's part of it costs a third when its
code is still in the processor's caches, which every forward and backward empties."""
MOST = 32
"""Steps that may be under way to the host before we wait for the oldest."""
NO_STEP_FOR_S = 0.3
"""When no step has come for so long, those that wait are recorded by another thread: the next may
be long in coming."""


class QueuedStep(Protocol):
    """A step whose values are under way."""

    arrival: HostTransfer

    def record(self) -> float:
        """Make its rows and record them, once they have arrived; returns the seconds of ours that
        are on some probe's account already."""


class StepQueue:
    """The steps of all optimizers, recorded in the order in which they were made.

    The training thread puts and drains; `drain_meanwhile` is for one other. A lock is held while a
    step is recorded, and none while one is put that waits for company.
    """

    def __init__(self) -> None:
        self._steps: deque[QueuedStep] = deque()
        self._recording = threading.Lock()
        self._put = 0.0
        self._drained = 0.0
        self._accounted_s = 0.0

    def put(self, step: QueuedStep, at_once: bool) -> None:
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

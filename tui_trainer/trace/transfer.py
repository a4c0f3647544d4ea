"""Moves one step's readings to the host in one copy per device.

On the CPU they are there at once. On an accelerator the copy goes into pinned memory without
waiting, and an event later signals that it has arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

from tui_trainer.trace.probe import Readings, Values

NO_VALUES: Values = np.empty(0)
UNWRITTEN = -7.1623e-133
"""Written to the end of pinned memory, and there until the copy has overwritten it."""
FEW = 64
"""Elements of a tensor up to which a list of them is made faster than a vector."""
SETTLE_S = 0.02
"""Time after which the whole of a copy has arrived whose end has: it takes microseconds."""


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


class TransferPart(NamedTuple):
    """Readings of one probe, or of the header."""

    readings: Readings
    owns_readings: bool
    """See `Probe.owns_readings`."""


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
        for part in parts:
            if not (part.owns_readings and on_host):
                for reading in part.readings:
                    if isinstance(reading, torch.Tensor) and not reading.is_cpu:
                        self._send()
                        return
        # Tensors that no other code overwrites are read later, those of many steps at once, when
        # the code that reads them is in the processor's caches.
        self._values = [
            None if part.owns_readings else _read_on_host(part.readings) for part in parts
        ]

    def _send(self) -> None:
        """Start one copy per device."""
        by_device: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
        position = 0
        for part in self._parts:
            for reading in part.readings:
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
        self._sizes = [length_of(part.readings) for part in self._parts]
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
        """The same for any thread, a little later.

        Looks at the memory, not at the events: while one thread captures a CUDA graph, a query by
        another would break the capture.
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
        """`values`, with the exception in place of what cannot be read."""
        if self._values is not None:
            found: list[Values | Exception] = []
            for part, values in zip(self._parts, self._values, strict=True):
                try:
                    found.append(_vector(part.readings if values is None else values))
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
    """Number of values."""
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
        if first.numel() > FEW:
            return flattened([torch.as_tensor(r) for r in readings]).numpy()
    return np.array(_read_on_host(readings), dtype=np.float64)

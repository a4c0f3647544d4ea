"""All of a step's readings, from wherever they were computed to the host, in one copy per device.

On the CPU they are there at once. On an accelerator the copy goes into pinned memory without
waiting, and an event says later that it has arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from tui_trainer.history.records import Floats


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


class Arrival:
    """Readings on their way to the host."""

    def __init__(self, parts: Sequence[Sequence[torch.Tensor]]) -> None:
        self._sizes = [sum(reading.numel() for reading in part) for part in parts]
        by_device: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
        position = 0
        for part in parts:
            for reading in part:
                by_device.setdefault(reading.device, []).append((position, reading))
                position += reading.numel()
        self._length = position
        self._copies: list[tuple[list[tuple[int, int]], torch.Tensor]] = []
        self._ready: list[Callable[[bool], bool]] = []
        for device, placed in by_device.items():
            vector = flattened([reading for _, reading in placed])
            spans = [(start, reading.numel()) for start, reading in placed]
            self._copies.append((spans, self._fetch(device, vector)))

    def _fetch(self, device: torch.device, vector: torch.Tensor) -> torch.Tensor:
        if device.type == "cpu":
            return vector
        if device.type != "cuda":
            return vector.cpu()  # no events on other devices that could tell of an arrival
        with torch.cuda.device(device):
            host = torch.empty(vector.shape, dtype=vector.dtype, device="cpu", pin_memory=True)
            host.copy_(vector, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()

        def ready(wait: bool) -> bool:
            if wait:
                event.synchronize()
            return bool(event.query())  # type: ignore[no-untyped-call]

        self._ready.append(ready)
        return host

    def arrived(self, wait: bool = False) -> bool:
        """Whether all is on the host; `wait` until it is."""
        return all(ready(wait) for ready in self._ready)

    def values(self) -> list[Floats]:
        """The values of each part, flattened. Only when `arrived`."""
        if len(self._copies) == 1:
            flat = self._copies[0][1].numpy()
        else:
            flat = np.empty(self._length, dtype=np.float32)
            for spans, host in self._copies:
                source, offset = host.numpy(), 0
                for start, count in spans:
                    flat[start : start + count] = source[offset : offset + count]
                    offset += count
        parts: list[Floats] = []
        position = 0
        for size in self._sizes:
            parts.append(flat[position : position + size])
            position += size
        return parts

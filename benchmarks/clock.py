"""The clock inside the training process, which measures the turns requested of that process.

The protocol uses two FIFOs in a directory, `to` and `from`, one JSON object per line:

    {"do": "train", "seconds": 0.5, "warm": 0.2, "threads": 2}
        → {"steps": 13, "seconds": 0.51, "median_ms": 38.9, "longest_ms": 44.0,
           "thread_s": 0.5, "process_s": 0.9}
    {"do": "profile", "steps": 10}     → {"steps": 10, "counts": {"cudaStreamSynchronize": 0, …}}
    {"do": "memory"}                   → {"peak_bytes": …, "held_bytes": …}
    {"do": "quit"}

Nothing is written during a turn: a step costs one reading of the clock, bare and traced alike.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

SYNCHRONIZING = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "Memcpy DtoH (Device -> Pageable)",
    "aten::_local_scalar_dense",
)
"""Operations that make the host wait for a device. The last one is `.item()`, which waits if the
tensor is on a device (and then also counts as a `cudaStreamSynchronize`)."""


class Clock:
    """Called once after each step; decides whether the training is over."""

    def __init__(self, directory: Path | None, steps: int, device: torch.device) -> None:
        self._steps_left = steps
        self._device = device
        self._ends: list[float] = []
        self._cpu = 0.0, 0.0
        self._warm_until = self._until = 0.0
        self._profiler: torch.profiler.profile | None = None
        self._profiled = 0
        self._ready_sent = False
        self._to = self._from = None
        if directory is not None:
            self._to = open(directory / "to")  # noqa: SIM115
            self._from = open(directory / "from", "w")  # noqa: SIM115

    def over(self) -> bool:
        """Record the end of a step; returns whether the training is over."""
        if self._to is None:
            self._steps_left -= 1
            return self._steps_left <= 0
        if self._profiler is not None:
            return self._step_profiled()
        now = time.perf_counter()
        if now < self._until:
            if now >= self._warm_until:
                if not self._ends:
                    self._synchronize()  # earlier work of the device does not belong to the turn
                    now = time.perf_counter()
                    self._cpu = time.thread_time(), time.process_time()
                self._ends.append(now)
            return False
        return self._turn_over()

    def _turn_over(self) -> bool:
        if not self._ready_sent:
            self._ready_sent = True
            self._send({"pid": os.getpid(), "threads": torch.get_num_threads()})
        elif self._until:
            self._synchronize()
            self._ends.append(time.perf_counter())
            times = [1e3 * (b - a) for a, b in zip(self._ends, self._ends[1:], strict=False)]
            seconds = self._ends[-1] - self._ends[0]
            median, longest = (statistics.median(times), max(times)) if times else (0.0, 0.0)
            self._send(
                {
                    "steps": len(times),
                    "seconds": seconds,
                    "median_ms": median,
                    "longest_ms": longest,
                    "thread_s": time.thread_time() - self._cpu[0],
                    "process_s": time.process_time() - self._cpu[1],
                }
            )
        return self._obey()

    def _obey(self) -> bool:
        """Wait for the next order and begin it; returns whether the training is to end."""
        assert self._to is not None
        while line := self._to.readline():
            order = json.loads(line)
            match order["do"]:
                case "train":
                    if order.get("threads"):
                        torch.set_num_threads(order["threads"])
                    self._synchronize()
                    self._ends = []
                    self._warm_until = time.perf_counter() + order["warm"]
                    self._until = self._warm_until + order["seconds"]
                    return False
                case "profile":
                    self._begin_profile(order["steps"])
                    return False
                case "memory":
                    self._send(self._memory())
                case "quit":
                    return True
        return True

    def _send(self, message: dict[str, Any]) -> None:
        assert self._from is not None
        self._from.write(json.dumps(message) + "\n")
        self._from.flush()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _memory(self) -> dict[str, int]:
        if self._device.type != "cuda":
            return {"peak_bytes": 0, "held_bytes": 0}
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(self._device),
            "held_bytes": torch.cuda.memory_allocated(self._device),
        }

    # ------------------------------------------------------------ synchronizations

    def _begin_profile(self, steps: int) -> None:
        self._synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        # One extra step: the profiler's own startup falls into the first.
        schedule = torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1)
        self._counts: Counter[str] = Counter()
        self._profiler = torch.profiler.profile(
            activities=activities, schedule=schedule, on_trace_ready=self._count
        )
        self._profiler.start()
        self._profiled, self._profile_steps = 0, steps

    def _count(self, profiler: torch.profiler.profile) -> None:
        for event in profiler.events() or ():
            if event.name in SYNCHRONIZING:
                self._counts[event.name] += 1

    def _step_profiled(self) -> bool:
        assert self._profiler is not None
        self._profiler.step()
        self._profiled += 1
        if self._profiled <= self._profile_steps:
            return False
        self._profiler.stop()
        self._profiler = None
        self._send({"steps": self._profile_steps, "counts": dict(self._counts)})
        self._until = 0.0
        return self._obey()

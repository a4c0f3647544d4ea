"""Records loss, learning rate, total gradient norm and duration of every step, the time of each
phase, the memory in use and the overhead of measuring."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from time import monotonic

import numpy as np
import psutil
import torch

from tui_trainer.history.records import Floats
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import Absent, absent, float32_row
from tui_trainer.protocol.schema import Column
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Probe, ProbeOptions, StepFacts, TableSpec, Values


class StepProbe(Probe):
    """Table `step`. The total norm is absent at steps that did not measure the gradients (nothing
    clips and the cadence of `grad_norm` is stretched)."""

    name = schema.STEP
    importance = 100

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        self.tables = (TableSpec(schema.STEP, schema.STEP_COLUMNS),)

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        row = (
            facts.loss,
            facts.learning_rate,
            facts.total_norm,
            facts.step_ms,
            facts.evaluations,
        )
        return (float32_row(row),)


class PhasesProbe(Probe):
    """Table `phase_ms`: time of each phase in a step; absent for a phase that the step lacks."""

    name = schema.PHASE_MS
    importance = 100

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        self.tables = (TableSpec(schema.PHASE_MS, schema.PHASE_COLUMNS),)

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        return (np.array(facts.phase_ms, dtype=np.float32),)


MEMORY_PERIOD_S = 1.0
OVERHEAD_STEPS = 10
"""Number of steps over which a row averages."""


class Memory(Probe):
    """Table `memory`, at most once a second, at the end of a step."""

    name = schema.MEMORY
    importance = 100

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        if tracked.key:  # one process: the first optimizer's probe is enough
            self.unseen = "measured with the first optimizer"
            return
        self.tables = (TableSpec(schema.MEMORY, schema.MEMORY_COLUMNS, every=0),)
        self._process = psutil.Process()
        self._next = 0.0

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        now = monotonic()
        if now < self._next:
            return (None,)
        self._next = now + MEMORY_PERIOD_S
        allocated, peak = device_memory(self.tracked.device)
        return (float32_row((allocated, peak, self._process.memory_info().rss)),)


def device_memory(device: torch.device) -> tuple[float, float]:
    """Bytes that PyTorch has allocated on `device`, now and at the peak; absent where a device has
    no memory of its own or does not report it."""
    kind = device.type
    if kind == "mps":
        return float(torch.mps.current_allocated_memory()), absent(Absent.NOT_MEASURED)
    if kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        return float(module.memory_allocated(device)), float(module.max_memory_allocated(device))
    return absent(Absent.NO_DEVICE), absent(Absent.NO_DEVICE)


class Overhead(Probe):
    """Table `overhead_ms`: mean of each probe over the last ten steps; `tracer` is the rest."""

    name = schema.OVERHEAD
    importance = 100

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        self._names = ("tracer", *options.probe_names)
        columns = tuple(Column(name, "ms", "lower") for name in self._names)
        self.tables = (TableSpec(schema.OVERHEAD, columns, every=OVERHEAD_STEPS),)
        self._taken: list[dict[str, float]] = []
        """Our overhead in each step since the last row."""

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        self._taken.append(facts.own_ms)
        if len(self._taken) < OVERHEAD_STEPS:
            return (None,)
        taken, self._taken = self._taken, []
        sums = [sum(map(dict.get, taken, repeat(name), repeat(0.0))) for name in self._names]
        return (np.array([ms / OVERHEAD_STEPS for ms in sums], dtype=np.float32),)

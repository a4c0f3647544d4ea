"""The overhead of measuring: our time on the training thread, by probe."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tui_trainer.history.records import Floats
from tui_trainer.protocol import schema
from tui_trainer.protocol.schema import Column
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Probe, ProbeOptions, StepFacts, TableSpec, Values

STEPS = 10
"""How many steps a row averages over."""


class Overhead(Probe):
    """Table `overhead_ms`: mean per step over the last ten; `tracer` is what no probe accounts
    for."""

    name = schema.OVERHEAD
    importance = 100

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        self._names = ("tracer", *options.probe_names)
        columns = tuple(Column(name, "ms", "lower") for name in self._names)
        self.tables = (TableSpec(schema.OVERHEAD, columns, every=STEPS),)
        self._sums = dict.fromkeys(self._names, 0.0)
        self._count = 0

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        for name, ms in facts.own_ms.items():
            if name in self._sums:
                self._sums[name] += ms
        self._count += 1
        if self._count < STEPS:
            return (None,)
        row = np.array([self._sums[name] / STEPS for name in self._names], dtype=np.float32)
        self._sums = dict.fromkeys(self._names, 0.0)
        self._count = 0
        return (row,)

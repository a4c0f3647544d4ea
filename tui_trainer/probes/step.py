"""Loss, learning rate, total gradient norm and duration of every step; the time of each phase."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tui_trainer.history.records import Floats
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import float32_row
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
    """Table `phase_ms`: time in the step of each phase; absent for one that it did not have."""

    name = schema.PHASE_MS
    importance = 100

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        self.tables = (TableSpec(schema.PHASE_MS, schema.PHASE_COLUMNS),)

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        return (np.array(facts.phase_ms, dtype=np.float32),)

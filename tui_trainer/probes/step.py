"""Loss, learning rate, total gradient norm and duration of every step; the time of each phase."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import numpy as np

from tui_trainer.history.records import Floats
from tui_trainer.protocol import schema
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Options, Probe, StepFacts, TableSpec


class Step(Probe):
    """Table `step`.

    The total norm is what `clip_grad_norm_` returned, where one call of it covered every gradient
    of the optimizer; else √Σ‖gᵢ‖². At steps for which neither was measured (nothing clips and the
    cadence of `grad_norm` is stretched) the last one stands.
    """

    name = schema.STEP
    importance = 100

    def __init__(self, tracked: TrackedParameters, options: Options) -> None:
        super().__init__(tracked, options)
        self.tables = (TableSpec(schema.STEP, schema.STEP_COLUMNS),)
        self._norm = float("nan")

    def rows(self, values: Floats, facts: StepFacts) -> Sequence[Floats | None]:
        """From what the tracer and the probe of the gradients found."""
        complete = [clip.norm_before for clip in facts.clips if clip.complete]
        if len(facts.clips) == 1 and complete and facts.clips[0].kind == "norm":
            self._norm = complete[0] / facts.gradient_scale
        elif facts.total_norm is not None:
            self._norm = facts.total_norm
        facts.total_norm = self._norm
        row = (facts.loss, facts.learning_rate, self._norm, facts.step_ms)
        return (np.array(row, dtype=np.float32),)


class Phases(Probe):
    """Table `phase_ms`: time in the step of each phase; NaN for one that the step did not have."""

    name = schema.PHASE_MS
    importance = 100

    def __init__(self, tracked: TrackedParameters, options: Options) -> None:
        super().__init__(tracked, options)
        self.tables = (TableSpec(schema.PHASE_MS, schema.PHASE_COLUMNS),)

    def rows(self, values: Floats, facts: StepFacts) -> Sequence[Floats | None]:
        """From the tracer's clock."""
        return (np.array([took or nan for took in facts.phase_ms], dtype=np.float32),)

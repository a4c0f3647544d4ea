"""Loss, learning rate, total gradient norm and duration of every step; the time of each phase."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import numpy as np

from tui_trainer.history.records import Floats
from tui_trainer.protocol import schema
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Options, Probe, StepFacts, TableSpec


class StepProbe(Probe):
    """Table `step`.

    The total norm is what `clip_grad_norm_` returned if one call of it covered every gradient of
    the optimizer, otherwise √Σ‖gᵢ‖². If neither was measured in a step (nothing clips, and the
    cadence of `grad_norm` is stretched), the last value is repeated.
    """

    name = schema.STEP
    importance = 100
    tables = (TableSpec(schema.STEP, schema.STEP_COLUMNS),)

    def __init__(self, tracked: TrackedParameters, options: Options) -> None:
        super().__init__(tracked, options)
        self._norm = float("nan")

    def rows(self, values: Floats, facts: StepFacts) -> Sequence[Floats | None]:
        complete = [clip.norm_before for clip in facts.clips if clip.complete]
        if len(facts.clips) == 1 and complete and facts.clips[0].kind == "norm":
            self._norm = complete[0] / facts.gradient_scale
        elif facts.total_norm is not None:
            self._norm = facts.total_norm
        facts.total_norm = self._norm
        row = (facts.loss, facts.learning_rate, self._norm, facts.step_ms)
        return (np.array(row, dtype=np.float32),)


class PhasesProbe(Probe):
    """Table `phase_ms`: time of each phase in the step; NaN for a phase that did not happen."""

    name = schema.PHASE_MS
    importance = 100
    tables = (TableSpec(schema.PHASE_MS, schema.PHASE_COLUMNS),)

    def rows(self, values: Floats, facts: StepFacts) -> Sequence[Floats | None]:
        return (np.array([took or nan for took in facts.phase_ms], dtype=np.float32),)

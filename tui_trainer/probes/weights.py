"""‖p‖₂ of every parameter, after the update. It changes by about a thousandth in a step."""

from __future__ import annotations

from collections.abc import Sequence

from tui_trainer.history.records import Floats
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import to_float32
from tui_trainer.protocol.schema import Column
from tui_trainer.trace.norms import Norms
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Probe, ProbeOptions, Readings, StepFacts, TableSpec, Values


class Weights(Probe):
    """Table `weight_norm`: one column per parameter."""

    name = schema.WEIGHT_NORM
    every = 10
    importance = 30
    max_stretch = 32
    often_in_short_runs = True
    owns_readings = True

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        self.tables = (TableSpec(schema.WEIGHT_NORM, tuple(Column(n) for n in tracked.names)),)
        self._norms = Norms(tracked.parameters, tracked.device)

    def after_update(self) -> Readings:
        return self._norms.read_kept(self.tracked.parameters)

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        """Also sets the norms for later probes."""
        facts.weight_norms = values
        return (to_float32(values),)

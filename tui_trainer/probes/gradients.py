"""‖∂L/∂p‖₂ of every parameter, before clipping and after un-scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tui_trainer.history.records import Floats
from tui_trainer.probes.norms import Norms
from tui_trainer.protocol import schema
from tui_trainer.protocol.schema import Column
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Gradient, Options, Probe, Readings, StepFacts, TableSpec


class Gradients(Probe):
    """Table `grad_norm`: one column per parameter; 0 where no gradient reached the parameter."""

    name = schema.GRAD_NORM
    importance = 50
    max_stretch = 4
    owns_readings = True

    def __init__(self, tracked: TrackedParameters, options: Options) -> None:
        super().__init__(tracked, options)
        self.tables = (TableSpec(schema.GRAD_NORM, tuple(Column(n) for n in tracked.names)),)
        self._norms = Norms(tracked.parameters, tracked.device)

    def gradients(self, gradients: Sequence[Gradient]) -> Readings:
        """One reading per parameter, and a 0 that marks them as our own."""
        return [*self._norms.read(gradients), self._norms.zero]

    def clip_norms(self, norms: Readings) -> Readings:
        """The same from the clipping, and 1."""
        return [*norms, self._norms.one]

    def rows(self, values: Floats, facts: StepFacts) -> Sequence[Floats | None]:
        """Also sets the norms and the total for later probes."""
        norms = self._norms.values(values[:-1], bool(values[-1])) / facts.gradient_scale
        facts.gradient_norms = norms
        facts.total_norm = math.sqrt(np.dot(norms, norms))
        return (norms.astype(np.float32),)

"""‖p‖₂ of every parameter, after the update: it moves by some thousandth a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tui_trainer.history.records import Floats
from tui_trainer.probes.norms import Norms
from tui_trainer.protocol import tables
from tui_trainer.protocol.describe import Column
from tui_trainer.tracing.probe import Facts, Options, Probe, Readings, TableSpec
from tui_trainer.tracing.subject import Subject


class Weights(Probe):
    """Table `weight_norm`: one column per parameter."""

    name = tables.WEIGHT_NORM
    every = 10
    importance = 30
    furthest = 32
    lasting = True

    def __init__(self, subject: Subject, options: Options) -> None:
        super().__init__(subject, options)
        self.tables = (TableSpec(tables.WEIGHT_NORM, tuple(Column(n) for n in subject.names)),)
        self._norms = Norms(subject.parameters, subject.device)

    def after_update(self) -> Readings:
        """One reading per parameter."""
        return self._norms.read_kept(self.subject.parameters)

    def rows(self, values: Floats, facts: Facts) -> Sequence[Floats | None]:
        """Also tells the other probes the norms."""
        facts.weight_norms = self._norms.values(values)
        return (facts.weight_norms.astype(np.float32),)

"""Measures ‖∂L/∂p‖₂ and ‖p‖₂ of every parameter: gradients before clipping and after unscaling,
weights after the update."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tui_trainer.history.records import Floats
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import Absent, absent, to_float32
from tui_trainer.protocol.schema import Column
from tui_trainer.trace.norms import Norms, norm_of
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Probe, ProbeOptions, Readings, StepFacts, TableSpec, Values


class Gradients(Probe):
    """Table `grad_norm`: one column per parameter; absent where there is no gradient."""

    name = schema.GRAD_NORM
    importance = 50
    max_stretch = 4
    owns_readings = True

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        self.tables = (TableSpec(schema.GRAD_NORM, tuple(Column(n) for n in tracked.names)),)

    def gradient_norms(self, norms: Readings) -> Readings:
        return norms

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        """Also sets the norms and their total for later probes."""
        codes = facts.absent_gradients
        if not values.size:  # the norms could not be read
            if codes is None:
                return (None,)
            values = np.zeros(len(codes))
        scale = facts.gradient_scale
        norms = values if scale == 1.0 and codes is None else values / scale
        facts.gradient_norms = norms
        own = norms[: self.tracked.own]
        if len(self.tracked.gone) == self.tracked.own:
            facts.total_norm = absent(Absent.NOT_IN_MODEL)
            if codes is not None:
                norms[codes != 0] = [absent(Absent(int(code))) for code in codes[codes != 0]]
            return (to_float32(norms),)
        there = None
        if codes is not None:
            for position in np.flatnonzero(codes):
                norms[position] = absent(Absent(int(codes[position])))
            there = codes[: self.tracked.own] == 0
        if facts.left_alone:
            there = np.ones(self.tracked.own, bool) if there is None else there
            there[list(facts.left_alone)] = False
        if there is not None:
            if not there.any():
                why = Absent.NO_GRADIENTS
                for unknown in (Absent.CHANGED_BY_HAND, Absent.CHANGED_BY_FRAMEWORK):
                    if codes is not None and (codes == unknown).all():
                        why = unknown
                facts.total_norm = absent(why)
                return (to_float32(norms),)
            own = own[there]
        facts.total_norm = self._total_of_shards(facts) if self.tracked.sharded else norm_of(own)
        return (to_float32(norms),)

    def _total_of_shards(self, facts: StepFacts) -> float:
        """The total of the whole gradient, as a clipping by norm has computed it: our own norms are
        those of this process's shards."""
        for clip in facts.clips:
            if clip.kind == "norm" and clip.two_norm and clip.positions is None:
                return clip.norm_before / facts.gradient_scale
        return absent(Absent.SHARDED)


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

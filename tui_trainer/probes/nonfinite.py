"""Reports NaN and infinity in loss, gradients and weights when they appear."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.records import Floats
from tui_trainer.protocol.messages import NonFiniteQuantity, NonFiniteValue
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Options, Probe, StepFacts


class NonFiniteProbe(Probe):
    """Makes events and no table: one when a quantity becomes non-finite, and another only after it
    was finite again.

    The loss is measured at every step, the others less often, so an event also names the last step
    at which the quantity was finite. It needs no measurement of its own: a norm is finite exactly
    if every element is (or its square overflows, which is as bad). Without a backward the loss is
    unknown, not NaN.
    """

    name = "nonfinite"
    importance = 100

    def __init__(self, tracked: TrackedParameters, options: Options) -> None:
        super().__init__(tracked, options)
        self._present: set[str] = set()
        self._finite_at: dict[NonFiniteQuantity, int] = {}

    def rows(self, values: Floats, facts: StepFacts) -> Sequence[Floats | None]:
        if facts.loss_known:
            if math.isfinite(facts.loss):
                self._is_finite("loss", facts)
            else:
                self._check("loss", np.array([facts.loss]), facts)
        if facts.gradient_norms is not None and math.isfinite(facts.total_norm or 0.0):
            self._is_finite("gradient", facts)
        else:
            self._check("gradient", facts.gradient_norms, facts)
        self._check("weight", facts.weight_norms, facts)
        return ()

    def _is_finite(self, quantity: NonFiniteQuantity, facts: StepFacts) -> None:
        self._present.discard(quantity)
        self._finite_at[quantity] = facts.step

    def _check(
        self, quantity: NonFiniteQuantity, found: NDArray[np.float64] | None, facts: StepFacts
    ) -> None:
        if found is None:
            return
        if math.isfinite(found.sum()):
            self._is_finite(quantity, facts)
        elif quantity not in self._present:
            self._present.add(quantity)
            first = int(np.argmin(np.isfinite(found)))
            parameter = "" if quantity == "loss" else self.tracked.names[first]
            value: NonFiniteValue = "nan"
            if not np.isnan(found[first]):
                value = "inf" if found[first] > 0 else "-inf"
            facts.nonfinite.append((quantity, parameter, value, self._finite_at.get(quantity)))

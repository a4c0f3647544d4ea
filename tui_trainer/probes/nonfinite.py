"""NaN and infinities in loss, gradients and weights: said when they appear."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.records import Floats
from tui_trainer.protocol.messages import NonFiniteQuantity, NonFiniteValue
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Options, Probe, StepFacts


class NonFinite(Probe):
    """No table: events. Said once when a quantity turns non-finite, again only after it had gone.
    Each is looked at whenever it is measured: the loss at every step, the others more seldom. So it
    is said, too, at which step the quantity was last seen to be finite.

    Costs nothing of its own: a norm is finite exactly when every element is (or its square
    overflows, which is as bad). Without any backward the loss is unknown, not NaN.
    """

    name = "nonfinite"
    importance = 100

    def __init__(self, tracked: TrackedParameters, options: Options) -> None:
        super().__init__(tracked, options)
        self._present: set[str] = set()
        self._finite_at: dict[NonFiniteQuantity, int] = {}

    def rows(self, values: Floats, facts: StepFacts) -> Sequence[Floats | None]:
        """Adds to `facts.nonfinite`."""
        if facts.loss_known:
            if math.isfinite(facts.loss):
                self._finite("loss", facts)
            else:
                self._see("loss", np.array([facts.loss]), facts)
        if facts.gradient_norms is not None and math.isfinite(facts.total_norm or 0.0):
            self._finite("gradient", facts)
        else:
            self._see("gradient", facts.gradient_norms, facts)
        self._see("weight", facts.weight_norms, facts)
        return ()

    def _finite(self, quantity: NonFiniteQuantity, facts: StepFacts) -> None:
        self._present.discard(quantity)
        self._finite_at[quantity] = facts.step

    def _see(
        self, quantity: NonFiniteQuantity, found: NDArray[np.float64] | None, facts: StepFacts
    ) -> None:
        if found is None:
            return
        if math.isfinite(found.sum()):
            self._finite(quantity, facts)
        elif quantity not in self._present:
            self._present.add(quantity)
            first = int(np.argmin(np.isfinite(found)))
            parameter = "" if quantity == "loss" else self.tracked.names[first]
            value: NonFiniteValue = "nan"
            if not np.isnan(found[first]):
                value = "inf" if found[first] > 0 else "-inf"
            facts.nonfinite.append((quantity, parameter, value, self._finite_at.get(quantity)))

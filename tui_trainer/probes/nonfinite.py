"""Reports nan and inf in loss, gradients and weights when they appear.

The module that produced them is found in `nonfinite_module.py`, the operation in
`trace/nonfinite_origin.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.records import Floats, NonFiniteRecord
from tui_trainer.protocol.absent import why_absent
from tui_trainer.protocol.events import NonFiniteQuantity
from tui_trainer.protocol.formatting import nonfinite
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Probe, ProbeOptions, StepFacts, Values


class NonFiniteProbe(Probe):
    """No table: events, once when a quantity turns non-finite and again only after it was finite.

    Each is checked whenever it is measured: the loss at every step, the others less often, so the
    event also has the step at which the quantity was last seen to be finite. Costs nothing of its
    own: norms are taken so that one is finite exactly where every element is.
    """

    name = "nonfinite"
    importance = 100

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        self._present: set[NonFiniteQuantity] = set()
        self._finite_at: dict[NonFiniteQuantity, int] = {}

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        """Adds to `facts.nonfinite`."""
        if math.isfinite(facts.loss):
            self._present.discard("loss")
            self._finite_at["loss"] = facts.step
        elif why_absent(facts.loss) is None:
            self._check("loss", np.array([facts.loss]), facts)
        self._check("gradient", facts.gradient_norms, facts, facts.absent_gradients)
        self._check("weight", facts.weight_norms, facts)
        return ()

    def _check(
        self,
        quantity: NonFiniteQuantity,
        found: NDArray[np.float64] | None,
        facts: StepFacts,
        absent: NDArray[np.uint8] | None = None,
    ) -> None:
        if found is None or (absent is not None and absent.all()):
            return
        if math.isfinite(np.add.reduce(found)):  # then each of them is
            self._present.discard(quantity)
            self._finite_at[quantity] = facts.step
            return
        finite = np.isfinite(found)
        if absent is not None:
            finite |= absent != 0
        if finite.all():
            self._present.discard(quantity)
            self._finite_at[quantity] = facts.step
        elif quantity not in self._present:
            self._present.add(quantity)
            first = int(np.argmin(finite))
            parameter = "" if quantity == "loss" else self.tracked.names[first]
            value = nonfinite(float(found[first]))
            finite_at = self._finite_at.get(quantity)
            facts.nonfinite.append(NonFiniteRecord(quantity, parameter, value, finite_at))

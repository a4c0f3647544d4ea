"""Whether the change that an optimizer's step made to a weight is still there at the next step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from tui_trainer.history.records import Floats
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import Probe, ProbeOptions, Readings, StepFacts, Values
from tui_trainer.trace.torch_private import is_sharded

SAMPLE = 256
"""Elements of the largest weight that are looked at."""
NEVER = 1 << 30


class KeptUpdates(Probe):
    """No table: sets `StepFacts.kept_update`, in the first steps, which follow on each other.

    ‖w₂ − w₀‖ / ‖w₁ − w₀‖ for a sample of the largest weight before the step, after it, and when the
    model is called for the next one: near 1, unless something writes to the weights in between.
    """

    name = "kept_updates"
    every = NEVER
    first_steps = 6
    importance = 12
    owns_readings = True

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        own = tracked.parameters[: tracked.own]
        plain = [p for p in own if p.is_floating_point() and not is_sharded(p)]
        self._weight = max(plain, key=torch.Tensor.numel, default=None)
        self._before: torch.Tensor | None = None
        self._after: torch.Tensor | None = None
        self._share: torch.Tensor | None = None
        """Of the update of the step before."""
        self._under_way: deque[bool] = deque()

    def _sample(self) -> torch.Tensor | None:
        if self._weight is None:
            return None
        flat = self._weight.detach().flatten()
        return flat[:: -(-flat.numel() // SAMPLE)].to(torch.float32, copy=True)

    def model_called(
        self, root: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._before is not None and self._after is not None and self._share is None:
            now = self._sample()
            if now is not None:
                self._share = (now - self._before).norm() / (self._after - self._before).norm()

    def before_update(self) -> None:
        self._before, self._after = self._sample(), None

    def after_update(self) -> Readings:
        self._after = self._sample()
        share, self._share = self._share, None
        self._under_way.append(share is not None)
        return [share] if share is not None else ()

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        """Sets `facts.kept_update`."""
        if self._under_way.popleft() and len(values) == 1 and math.isfinite(values[0]):
            facts.kept_update = float(values[0])
        return ()

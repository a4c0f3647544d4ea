"""The clip scale: how much clipping scaled down the gradient of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tui_trainer.history.records import ClipRecord, Floats
from tui_trainer.protocol import schema
from tui_trainer.trace.probe import ClipMeasurement, Probe, StepFacts, TableSpec

MAX_DOMINANT = 8
"""Parameters that an event names, those with the largest gradients."""


def clip_scale(clip: ClipMeasurement) -> float:
    """The factor that the gradient was multiplied by.

    For clipping by norm it is PyTorch's formula, min(1, max_norm / (norm + 1e-6)); for clipping by
    value it is the norm after over the norm before. NaN if the norm is NaN.
    """
    before = clip.norm_before
    if clip.kind == "value":
        return clip.norm_after / before if before else 1.0
    if math.isnan(before):
        return before
    return min(1.0, clip.max_norm / (before + 1e-6))


class Clipping(Probe):
    """Table `clip`, and an event for every step with a scale below 1.

    If a step has several calls (groups that are clipped separately), the smallest scale counts.
    Norms are un-scaled; the scale is the one that was applied.
    """

    name = schema.CLIP
    importance = 100
    tables = (TableSpec(schema.CLIP, schema.CLIP_COLUMNS),)

    def rows(self, values: Floats, facts: StepFacts) -> Sequence[Floats | None]:
        """None for a step without a call of a clipping function."""
        if not facts.clips:
            return (None,)
        hardest, scale = facts.clips[0], clip_scale(facts.clips[0])
        for clip in facts.clips[1:]:
            if not clip_scale(clip) >= scale:  # true for NaN as well
                hardest, scale = clip, clip_scale(clip)
        before = hardest.norm_before / facts.gradient_scale
        # Clipping by value may change single elements but not the norm in float32.
        if scale < 1:
            facts.clip = self._event(hardest, before, scale, facts)
        row = (hardest.max_norm, before, before * scale, scale)
        return (np.array(row, dtype=np.float32),)

    def _event(
        self, clip: ClipMeasurement, before: float, scale: float, facts: StepFacts
    ) -> ClipRecord:
        norms = facts.gradient_norms
        parameters: tuple[int, ...] = ()
        shares: tuple[float, ...] = ()
        if norms is not None:
            squares = norms * norms
            total = float(squares.sum())
            if 0 < total < math.inf:
                largest = np.argsort(-squares, kind="stable")[:MAX_DOMINANT]
                parameters = tuple(self.tracked.indices[i] for i in largest)
                shares = tuple(float(squares[i] / total) for i in largest)
        return ClipRecord(clip.max_norm, before, scale, parameters, shares, clip.kind)

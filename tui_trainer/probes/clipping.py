"""Records what clipping did to the gradients of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tui_trainer.history.records import ClipRecord, Floats
from tui_trainer.protocol import schema
from tui_trainer.protocol.absent import Absent, absent, float32_row, why_absent
from tui_trainer.trace.norms import clip_scale, norm_of
from tui_trainer.trace.parameters import TrackedParameters
from tui_trainer.trace.probe import (
    ClipMeasurement,
    Probe,
    ProbeOptions,
    StepFacts,
    TableSpec,
    Values,
)

DOMINANT = 8
"""Number of parameters that an event names."""


class ClippingProbe(Probe):
    """Table `clip`, and an event for every step with scale < 1.

    Of several clippings in one step (groups clipped separately), the one with the smallest scale
    counts. Norms are those at the time of the clipping, with the loss scale `gradient_scale`.
    """

    name = schema.CLIP
    importance = 100

    def __init__(self, tracked: TrackedParameters, options: ProbeOptions) -> None:
        super().__init__(tracked, options)
        self.tables = (TableSpec(schema.CLIP, schema.CLIP_COLUMNS),)

    def rows(self, values: Values, facts: StepFacts) -> Sequence[Floats | None]:
        """A row if any clipping was called, whether or not it changed the gradients."""
        facts.clips = [clip for clip in facts.clips if not _untouched(clip)]
        if not facts.clips:
            return (None,)
        hardest, scale = facts.clips[0], _scale(facts.clips[0])
        for clip in facts.clips[1:]:
            if not _scale(clip) >= scale:  # also where it is nan
                hardest, scale = clip, _scale(clip)
        before = hardest.norm_before
        if hardest.kind == "norm":
            # The function's own sum of squares in float32 may have underflowed.
            if hardest.two_norm and before == 0 and hardest.total_before > 0:
                before = hardest.total_before
            after = before * scale
            if scale == 0 and math.isinf(before):
                after = self._after_overflow(hardest, facts)
        else:
            after = hardest.norm_after
        # Clipping by value may cut single elements without a change of the norm in float32.
        if scale < 1:
            facts.clip = self._event(hardest, before, scale, facts)
        row = (hardest.max_norm, before, after, scale, hardest.gradient_scale)
        return (float32_row(row),)

    def _event(
        self, clip: ClipMeasurement, before: float, scale: float, facts: StepFacts
    ) -> ClipRecord:
        parameters: tuple[int, ...] = ()
        shares: tuple[float, ...] = ()
        # The norms of this process's shards do not add up to the total of all processes.
        norms = None if self.tracked.sharded else self._norms(clip, facts)
        if norms is not None:
            total = clip.total_before
            if why_absent(total) is not None:
                total = norm_of(norms)
            if 0 < total < math.inf:
                parts = np.square(norms / total)
                largest = np.argsort(-parts, kind="stable")[:DOMINANT]
                found = np.minimum(parts[largest], 1.0)
                count = int(np.count_nonzero(found > 0))
                shares = tuple(found[:count].tolist())
                parameters = tuple([self.tracked.indices[i] for i in largest[:count].tolist()])
        limit = clip.max_norm
        return ClipRecord(
            max_norm=0.0 if why_absent(limit) is not None else limit,
            norm_before=before,
            scale=scale,
            parameters=parameters,
            shares=shares,
            kind=clip.kind,
            gradient_scale=clip.gradient_scale,
        )

    def _after_overflow(self, clip: ClipMeasurement, facts: StepFacts) -> float:
        """Norm of gradients that were multiplied by 0: nan if any element was infinite, 0 if only
        the sum of squares was."""
        norms = self._norms(clip, facts)
        if norms is None:
            return absent(Absent.NOT_MEASURED)
        return 0.0 if np.isfinite(norms).all() else math.nan

    def _norms(self, clip: ClipMeasurement, facts: StepFacts) -> Values | None:
        """Norms of the clipped gradients before the clipping; 0 for the others."""
        if clip.norms is not None:
            norms = clip.norms
        elif clip.known and facts.gradient_norms is not None:
            norms = facts.gradient_norms * clip.gradient_scale
        else:
            return None
        if clip.positions is None and facts.absent_gradients is None:
            return norms
        clipped = np.ones(len(norms), bool)
        if clip.positions is not None:
            clipped[:] = False
            clipped[clip.positions] = True
        if facts.absent_gradients is not None:
            clipped &= facts.absent_gradients == 0
        return np.where(clipped, norms, 0.0)


def _scale(clip: ClipMeasurement) -> float:
    return clip_scale(clip.kind, clip.max_norm, clip.norm_before, clip.norm_after)


def _untouched(clip: ClipMeasurement) -> bool:
    """Whether gradients that the script may have changed by itself turn out to be unchanged."""
    same = clip.norm_before == clip.norm_after
    both_nan = math.isnan(clip.norm_before) and math.isnan(clip.norm_after)
    return clip.tentative and (same or both_nan)

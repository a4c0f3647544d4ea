"""The snapshots that `time_travel` goes back to, within a memory budget: dense near the present,
sparser further back."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from tui_trainer.travel.training_state import TrainingState

MAX_SHARE = 0.02
"""Largest share of the time of a step that taking snapshots may cost: it sets their cadence."""
MAX_INTERVAL = 1000


@dataclass(frozen=True, eq=False)
class TrainingSnapshot:
    """The state of a training at the end of a step."""

    step: int
    state: TrainingState
    edits: Any
    """As `LiveEdits.snapshot` returned it."""


class SnapshotRing:
    """The snapshots of one training, by step."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._kept: list[TrainingSnapshot] = []

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(each.step for each in self._kept)

    @property
    def nbytes(self) -> int:
        return sum(each.state.nbytes for each in self._kept)

    def add(self, snapshot: TrainingSnapshot) -> None:
        """Keep a snapshot, and drop those whose neighbours cover their steps best."""
        self._kept = [each for each in self._kept if each.step != snapshot.step]
        self._kept.insert(bisect_right(self.steps, snapshot.step), snapshot)
        while len(self._kept) > 2 and self.nbytes > self.budget_bytes:
            del self._kept[self._least_needed(snapshot.step)]

    def _least_needed(self, now: int) -> int:
        """The snapshot whose loss costs the fewest repeated steps, in proportion to its distance
        from `now`. The first one, from which every step can be reached, stays."""

        def cost(index: int) -> float:
            gap = self._kept[index + 1].step - self._kept[index - 1].step
            return gap / (1 + abs(now - self._kept[index].step))

        return min(range(1, len(self._kept) - 1), key=cost)

    def before(self, step: int) -> TrainingSnapshot | None:
        """The nearest one at or before `step`."""
        position = bisect_right(self.steps, step)
        return self._kept[position - 1] if position else None

    def forget_after(self, step: int) -> None:
        """Drop the snapshots of later steps, which this training will not repeat."""
        self._kept = [each for each in self._kept if each.step <= step]


def interval(copy_s: float, step_s: float) -> int:
    """Steps between two snapshots, of which each takes `copy_s`."""
    if step_s <= 0:
        return 1
    return min(MAX_INTERVAL, max(1, math.ceil(copy_s / (MAX_SHARE * step_s))))

"""Gradient norms of every parameter, whichever optimizer's table they are in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tui_trainer.protocol import tables
from tui_trainer.session.api import Snapshot
from tui_trainer.ui.panels.base import provisional

Values = NDArray[np.float32]


class GradientNorms:
    """The columns of all tables, one after the other."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.histories = snapshot.history.of_every_optimizer(tables.GRAD_NORM)
        self._starts = np.cumsum([0, *(each.columns for each in self.histories)])

    @property
    def names(self) -> list[str]:
        """Of the parameters."""
        return [column.name for each in self.histories for column in each.table.columns]

    @property
    def measured(self) -> bool:
        """Whether there is a value at all."""
        return any(each.rows for each in self.histories)

    @property
    def every(self) -> int:
        """The longest cadence among the tables."""
        return max((each.table.every for each in self.histories), default=1)

    @property
    def last_step(self) -> int:
        """The newest step that was measured."""
        return max((each.last_step or 0 for each in self.histories), default=0)

    def fresh(self) -> bool:
        """Whether some values are those of a step in the making."""
        return any(provisional(self._snapshot, each) is not None for each in self.histories)

    def latest(self) -> Values:
        """The newest of each, (parameters,); NaN: not measured yet."""
        found: list[Values] = []
        for each in self.histories:
            newest = each.latest()
            values = provisional(self._snapshot, each)
            if values is None:
                values = newest[1] if newest else np.full(each.columns, np.nan, np.float32)
            found.append(values)
        return np.concatenate(found) if found else np.empty(0, np.float32)

    def recent(self, rows: int) -> Values:
        """The mean of the last `rows` of each, (parameters,)."""
        found = [
            each.tail(rows)[1].mean(0) if each.rows else np.full(each.columns, np.nan, np.float32)
            for each in self.histories
        ]
        return np.concatenate(found) if found else np.empty(0, np.float32)

    def highest(
        self, wanted: Sequence[int], start: int, stop: int, cells: int
    ) -> tuple[Values, NDArray[np.bool_]]:
        """The highest value in each of `cells` stretches of steps, and whether one was not finite:
        both (len(wanted), cells)."""
        places = np.asarray(wanted, np.int64)
        high = np.full((len(places), cells), np.nan, np.float32)
        bad = np.zeros((len(places), cells), np.bool_)
        for number, each in enumerate(self.histories):
            first, end = self._starts[number], self._starts[number + 1]
            here = np.flatnonzero((places >= first) & (places < end))
            if len(here) and each.rows:
                seen = each.window((places[here] - first).tolist(), start, stop, cells)
                high[here], bad[here] = seen.high.T, seen.nonfinite.T
        return high, bad

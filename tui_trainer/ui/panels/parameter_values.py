"""The newest values of every parameter, as arrays in the order of `RunInfo.parameters`.

With several optimizers each has its own tables; here they are one again. Arrays, not objects, so
that 10,000 parameters sort in a millisecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.table import TableHistory
from tui_trainer.protocol import tables
from tui_trainer.protocol.describe import RunInfo
from tui_trainer.protocol.messages import NonFinite
from tui_trainer.session.api import Snapshot
from tui_trainer.ui.panels.base import provisional

Values = NDArray[np.float32]
Places = NDArray[np.int64]
QUANTITIES = (tables.GRAD_NORM, tables.WEIGHT_NORM, tables.UPDATE_RATIO)


@dataclass(frozen=True)
class Source:
    """One table and the parameters of its columns."""

    history: TableHistory
    parameters: Places
    """Of each column, its place in `RunInfo.parameters`; -1: not among them."""


class ParameterValues:
    """What is known of every parameter now."""

    def __init__(self) -> None:
        self.info: RunInfo | None = None
        self.sources: dict[str, list[Source]] = {}
        self.latest: dict[str, Values] = {}
        self.provisional: dict[str, bool] = {}
        """Whether a quantity's values are those of a step in the making."""
        self.first_bad: dict[int, NonFinite] = {}
        """Parameter to the last event that named it."""
        self._events_seen = 0
        self._revision: tuple[int, int] | None = None

    def take(self, snapshot: Snapshot) -> bool:
        """Read the newest values. Returns whether the parameters themselves are others now."""
        info = snapshot.info
        if info is None:
            return False
        revision = (info.revision, len(snapshot.history.tables))
        anew = self.info is None or revision != self._revision
        if anew:
            self._index(snapshot, info)
            self._revision = revision
        count = len(info.parameters)
        for quantity in QUANTITIES:
            values = np.full(count, np.nan, np.float32)
            self.provisional[quantity] = False
            for source in self.sources[quantity]:
                row = provisional(snapshot, source.history)
                self.provisional[quantity] |= row is not None
                if row is None:
                    newest = source.history.latest()
                    row = newest[1] if newest else None
                if row is not None:
                    known = source.parameters >= 0
                    values[source.parameters[known]] = row[known]
            self.latest[quantity] = values
        self._events(snapshot)
        return anew

    def _index(self, snapshot: Snapshot, info: RunInfo) -> None:
        self.info = info
        places = {parameter.name: place for place, parameter in enumerate(info.parameters)}
        self.first_bad.clear()
        self._events_seen = 0
        for quantity in QUANTITIES:
            self.sources[quantity] = [
                Source(history, np.array([places.get(c.name, -1) for c in history.table.columns]))
                for history in snapshot.history.tables.values()
                if history.table.name == quantity
            ]
        self._places = places

    def _events(self, snapshot: Snapshot) -> None:
        for event in reversed(snapshot.events):
            if event.id < self._events_seen:
                break
            if isinstance(event, NonFinite) and event.parameter in self._places:
                self.first_bad.setdefault(self._places[event.parameter], event)
        if snapshot.events:
            self._events_seen = snapshot.events[-1].id + 1

    def measured(self, quantity: str, parameter: int) -> bool:
        """Whether `quantity` of `parameter` has been measured at all."""
        return self.series(quantity, parameter) is not None

    def all_measured(self, quantity: str) -> NDArray[np.bool_]:
        """Of each parameter, whether `quantity` has been measured at all."""
        known = np.zeros(len(self.latest[quantity]), np.bool_)
        for source in self.sources.get(quantity, ()):
            if source.history.rows:
                known[source.parameters[source.parameters >= 0]] = True
        return known

    def series(self, quantity: str, parameter: int) -> tuple[TableHistory, int] | None:
        """History and column of `quantity` of `parameter`; None before its first value."""
        for source in self.sources.get(quantity, ()):
            found = np.flatnonzero(source.parameters == parameter)
            if len(found) and source.history.rows:
                return source.history, int(found[0])
        return None

    @property
    def shares(self) -> Values:
        """‖gᵢ‖² / Σ‖g‖² of each parameter, over those with a finite norm."""
        squares = np.square(self.latest[tables.GRAD_NORM].astype(np.float64))
        total = squares[np.isfinite(squares)].sum()
        if not total > 0:
            return np.full(len(squares), np.nan, np.float32)
        return np.asarray(squares / total, np.float32)

    def trends(
        self, quantity: str, parameters: Sequence[int] | Places, buckets: int
    ) -> tuple[Values, NDArray[np.bool_]]:
        """Highest value and whether something was not finite, in each of `buckets` stretches of the
        run so far; both (parameters, buckets). Fewer stretches are filled by fewer rows."""
        wanted = np.asarray(parameters, np.int64)
        high = np.full((len(wanted), buckets), np.nan, np.float32)
        bad = np.zeros((len(wanted), buckets), np.bool_)
        for source in self.sources.get(quantity, ()):
            history = source.history
            if not history.rows or not len(source.parameters):
                continue
            order = np.argsort(source.parameters)
            at = np.searchsorted(source.parameters, wanted, sorter=order)
            columns = order[np.minimum(at, len(order) - 1)]
            here = np.flatnonzero(source.parameters[columns] == wanted)
            if not len(here):
                continue
            start, stop = history.first_step or 0, (history.last_step or 0) + 1
            filled = min(buckets, history.rows)  # no gaps between rare measurements
            seen = history.window(columns[here].tolist(), start, stop, filled)
            high[here, :filled] = seen.high.T
            bad[here, :filled] = seen.nonfinite.T
        return high, bad

"""Every column of every parameter: sorted, filtered, and drawn only where it is in sight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from rich.style import Style

from tui_trainer.client.api import Snapshot
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import formatting, schema
from tui_trainer.protocol.messages import NonFinite
from tui_trainer.protocol.schema import RunInfo
from tui_trainer.ui.panels.base import provisional
from tui_trainer.ui.widgets.braille import sparklines
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.table import Ids, TableColumn, VirtualTable, fitted

# ---- parameter_values
# The newest values of every parameter, as arrays in the order of `RunInfo.parameters`.
#
# With several optimizers each has its own tables; here they are one again. Arrays, not objects, so
# that 10,000 parameters sort in a millisecond.


Values = NDArray[np.float32]
Places = NDArray[np.int64]
QUANTITIES = (schema.GRAD_NORM, schema.WEIGHT_NORM, schema.UPDATE_RATIO)


@dataclass(frozen=True)
class Source:
    """One table and the parameters of its columns."""

    history: SeriesReader
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

    def series(self, quantity: str, parameter: int) -> tuple[SeriesReader, int] | None:
        """History and column of `quantity` of `parameter`; None before its first value."""
        for source in self.sources.get(quantity, ()):
            found = np.flatnonzero(source.parameters == parameter)
            if len(found) and source.history.rows:
                return source.history, int(found[0])
        return None

    @property
    def shares(self) -> Values:
        """‖gᵢ‖² / Σ‖g‖² of each parameter, over those with a finite norm."""
        squares = np.square(self.latest[schema.GRAD_NORM].astype(np.float64))
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


TREND = 14
NAME_SHARE = 0.42
"""Of the width, at most, for names."""
NAME = TableColumn("name", "parameter", 0, left=True, tooltip="Name, as the model has it")
TREND_COLUMN = TableColumn(
    "trend", "trend", TREND, left=True, tooltip="Largest gradient norm over the run"
)
COLUMNS = (
    TableColumn("grad", "grad norm", 9, tooltip="‖∂L/∂p‖₂ before clipping"),
    TREND_COLUMN,
    TableColumn("share", "share", 6, tooltip="‖g‖² as a share of the total norm²"),
    TableColumn("update", "update", 8, tooltip="‖Δw‖ / ‖w‖ of a step; healthy near 1e-3"),
    TableColumn("weight", "‖w‖", 9, tooltip="Norm of the weights"),
    TableColumn("bad", "non-finite", 10, tooltip="NaN or infinity: now, or at which step last"),
    TableColumn("numel", "numel", 7, tooltip="Number of elements"),
    TableColumn("shape", "shape", 15, left=True, tooltip="Shape of the tensor"),
    TableColumn("dtype", "dtype", 8, left=True, tooltip="Type of its elements"),
    TableColumn("optimizer", "optimizer", 10, left=True, tooltip="Which optimizer updates it"),
)
SORTABLE = ("order", "name", *(column.key for column in COLUMNS if column.key != "trend"))
"""What the table can be sorted by; `order` is the model's own."""


class ParameterTable(VirtualTable):
    """Rows are parameters, numbered as in `RunInfo.parameters`."""

    def __init__(self, values: ParameterValues, *, id: str | None = None) -> None:
        super().__init__((NAME, *COLUMNS), id=id)
        self.values = values
        self.filter = ""
        self.sorted_by = "order"
        self.first_column = 0
        """Columns after the name that are shifted out to the left."""
        self.elements = 0
        """Of all parameters together."""
        self._names: tuple[str, ...] = ()
        self._longest = 12
        self._matched: tuple[str, Ids] | None = None
        self._trends: dict[int, str] = {}
        self._trend_width = TREND
        self._shares: Values = np.empty(0, np.float32)

    # ------------------------------------------------------------ order

    def take_names(self) -> None:
        """The parameters are others."""
        info = self.values.info
        self._names = tuple(p.name.casefold() for p in info.parameters) if info else ()
        self._longest = max(map(len, self._names), default=12)
        self.elements = sum(parameter.numel for parameter in info.parameters) if info else 0
        self._matched = None

    def rearrange(self) -> None:
        """Filter and sort anew; the cursor stays on its parameter."""
        order = self._matching()
        if self.sorted_by != "order" and len(order):
            order = order[_argsort(self._keys(order), self.descending)]
        elif self.sorted_by == "order" and not self.descending:
            order = order[::-1]
        self.set_order(order)

    def _matching(self) -> Ids:
        """The parameters whose name has all words of the filter."""
        if self._matched is None or self._matched[0] != self.filter:
            words = self.filter.casefold().split()
            names = self._names
            found = [i for i, name in enumerate(names) if all(word in name for word in words)]
            self._matched = (self.filter, np.array(found, np.int64))
        return self._matched[1]

    def _keys(self, order: Ids) -> NDArray[np.generic]:
        values, info = self.values, self.values.info
        assert info is not None
        parameters = info.parameters
        match self.sorted_by:
            case "grad":
                return values.latest[schema.GRAD_NORM][order]
            case "share":
                return values.shares[order]
            case "update":
                return values.latest[schema.UPDATE_RATIO][order]
            case "weight":
                return values.latest[schema.WEIGHT_NORM][order]
            case "bad":
                return self._badness()[order]
            case "numel":
                return np.array([parameters[i].numel for i in order])
            case "shape":
                return np.array([str(parameters[i].shape) for i in order])
            case "dtype":
                return np.array([parameters[i].dtype for i in order])
            case "optimizer":
                return np.array([parameters[i].optimizer for i in order])
        return np.array([parameters[i].name for i in order])

    def _badness(self) -> NDArray[np.float32]:
        """Of each parameter: infinite while something is not finite, else the step at which it
        last was; 0: never."""
        worst = np.zeros(len(self._names), np.float32)
        for parameter, event in self.values.first_bad.items():
            worst[parameter] = event.step
        for quantity in (schema.GRAD_NORM, schema.WEIGHT_NORM, schema.UPDATE_RATIO):
            measured = self.values.all_measured(quantity)
            worst[measured & ~np.isfinite(self.values.latest[quantity])] = np.inf
        return worst

    def _bad_now(self, parameter: int) -> str:
        for quantity in (schema.GRAD_NORM, schema.WEIGHT_NORM, schema.UPDATE_RATIO):
            value = float(self.values.latest[quantity][parameter])
            if not np.isfinite(value) and self.values.measured(quantity, parameter):
                return "nan" if value != value else "inf"
        return ""

    def shift(self, by: int) -> None:
        """Show columns further right, or back."""
        self.first_column = min(max(self.first_column + by, 0), len(COLUMNS) - 1)
        self.columns = (NAME, *COLUMNS[self.first_column :])
        self.update_rows()

    # ------------------------------------------------------------ drawing

    def prepare(self, visible: Ids) -> None:
        """Trends of the rows in sight, in one look at the history."""
        high, bad = self.values.trends(schema.GRAD_NORM, visible, self._trend_width)
        lines = sparklines(high, bad, self.glyphs, hold=True)
        self._trends = dict(zip(visible.tolist(), lines, strict=True))
        self._shares = self.values.shares

    def visible_columns(self, width: int) -> tuple[list[TableColumn], list[int]]:
        """The name first: names differ in their middle, so it has the room it needs if there is."""
        name = min(self._longest, max(20, int(width * NAME_SHARE)))
        columns, widths, left = [self.columns[0]], [name], width - 2 - name
        for column in self.columns[1:]:
            if column.width < left:
                columns.append(column)
                widths.append(column.width)
                left -= column.width + 1
        more = max(0, min(left, self._longest - name))
        widths[0] += more
        if TREND_COLUMN in columns:
            place = columns.index(TREND_COLUMN)
            widths[place] += max(0, min(left - more, 2 * TREND))
            self._trend_width = widths[place]
        return columns, widths

    def cells(self, row: int, columns: Sequence[TableColumn], widths: Sequence[int]) -> Row:
        """One parameter."""
        return [
            self._cell(column.key, row, width)
            for column, width in zip(columns, widths, strict=True)
        ]

    def _cell(self, key: str, row: int, width: int) -> Segment:
        info, palette = self.values.info, self.palette
        assert info is not None
        parameter = info.parameters[row]
        match key:
            case "name":
                style = palette.text if parameter.trainable else palette.dim
                return Segment(fitted(parameter.name, width, left=True), style)
            case "grad":
                return self._value(schema.GRAD_NORM, row, width, formatting.number)
            case "update":
                return self._value(schema.UPDATE_RATIO, row, width, formatting.scientific)
            case "weight":
                return self._value(schema.WEIGHT_NORM, row, width, formatting.number)
            case "share":
                share = float(self._shares[row]) if row < len(self._shares) else None
                return Segment(formatting.percent(share, width), palette.text)
            case "trend":
                return Segment(self._trends.get(row, "").ljust(width), palette.norm)
            case "bad":
                return self._bad_cell(row, width)
            case "numel":
                return Segment(formatting.count(parameter.numel, width), palette.dim)
            case "shape":
                shape = f" {self.glyphs.times} ".join(map(str, parameter.shape)) or "scalar"
                return Segment(fitted(shape, width, left=True), palette.dim)
            case "dtype":
                return Segment(fitted(parameter.dtype, width, left=True), palette.dim)
        frozen = "" if parameter.trainable else "frozen"
        return Segment(fitted(parameter.optimizer or frozen, width, left=True), palette.dim)

    def _value(
        self, quantity: str, row: int, width: int, show: Callable[[float | None, int], str]
    ) -> Segment:
        value = float(self.values.latest[quantity][row])
        if not np.isfinite(value):
            if not self.values.measured(quantity, row):
                return Segment(self.glyphs.missing.rjust(width), self.palette.faint)
            return Segment(show(value, width), self.palette.error)
        style: Style = self.palette.text
        if self.values.provisional.get(quantity):
            style = self.palette.provisional
        return Segment(show(value, width), style)

    def _bad_cell(self, row: int, width: int) -> Segment:
        if now := self._bad_now(row):
            return Segment(now.rjust(width), self.palette.error)
        event = self.values.first_bad.get(row)
        if event is None:
            return Segment(self.glyphs.missing.rjust(width), self.palette.faint)
        return Segment(fitted(f"at {event.step:,}", width), self.palette.warning)


def _argsort(keys: NDArray[np.generic], descending: bool) -> Ids:
    """Stable; what is not known comes last either way, and infinity is the largest."""
    if keys.dtype.kind == "f":
        numbers = keys.astype(np.float64)
        unknown = np.isnan(numbers)
        numbers = np.where(unknown, np.inf, -numbers if descending else numbers)
        return np.lexsort((numbers, unknown)).astype(np.int64)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    return order[::-1] if descending else order

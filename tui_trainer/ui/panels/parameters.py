"""The table of all parameters: every quantity of each, sorted and filtered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from tui_trainer.client.api import Snapshot
from tui_trainer.history import History
from tui_trainer.history.healthy_ranges import UPDATE_RATIO
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import formatting, schema
from tui_trainer.protocol.absent import absent_mask, why_absent
from tui_trainer.protocol.events import NonFinite
from tui_trainer.protocol.schema import ParameterInfo, RunInfo
from tui_trainer.ui.panels.base import newest_row
from tui_trainer.ui.widgets.braille import sparklines
from tui_trainer.ui.widgets.table import Cell, RowIds, TableColumn, VirtualTable

Values = NDArray[np.float32]
Indices = NDArray[np.int64]

QUANTITIES = (schema.GRAD_NORM, schema.WEIGHT_NORM, schema.UPDATE_RATIO)
MODEL_ORDER = "order"
"""`sorted_by` of a table in the order of the model."""
TREND_WIDTH = 14
MAX_TREND_WIDTH = 3 * TREND_WIDTH
MAX_NAME_SHARE = 0.42
"""Largest share of the width for names."""
MIN_NAME_WIDTH = 20


@dataclass(frozen=True)
class ParameterTableSource:
    """A recorded table and the parameters that its columns belong to."""

    series: SeriesReader
    parameters: Indices
    """Index of each column in `RunInfo.parameters`; -1 for none."""


class ParameterValues:
    """The newest values of all parameters, as arrays in the order of `RunInfo.parameters`.

    With several optimizers each has its own tables; here they are joined. Arrays rather than
    objects, so that 10,000 parameters are sorted in a millisecond.
    """

    def __init__(self) -> None:
        self.info: RunInfo | None = None
        self.newest: dict[str, Values] = {}
        """Newest values by quantity, each (parameters,); nan before the first measurement."""
        self.provisional: dict[str, bool] = {}
        """Whether the newest values are those of an unfinished step, by quantity."""
        self.last_nonfinite: dict[int, NonFinite] = {}
        """The last event about each parameter, by the parameter's index."""
        self._sources: dict[str, list[ParameterTableSource]] = {}
        self._indices: dict[str, int] = {}
        self._next_event = 0
        self._revision: tuple[int, History, int] | None = None
        """What `_sources` was built for: (revision of the description, history, number of its
        tables)."""
        self._sharded = False
        """Whether some norms are only those of rank 0's shards."""

    def update(self, snapshot: Snapshot) -> bool:
        """Read the newest values. Returns whether the parameters themselves have changed."""
        info = snapshot.info
        if info is None:
            return False
        revision = (info.revision, snapshot.history, len(snapshot.history.tables))
        changed = revision != self._revision
        if changed:
            self._revision = revision
            self._index(snapshot, info)
        for quantity in QUANTITIES:
            self._read(snapshot, quantity, len(info.parameters))
        self._read_events(snapshot)
        return changed

    def _index(self, snapshot: Snapshot, info: RunInfo) -> None:
        self.info = info
        self._indices = {parameter.name: i for i, parameter in enumerate(info.parameters)}
        self._sharded = any(parameter.sharded for parameter in info.parameters)
        self.last_nonfinite.clear()
        self._next_event = 0
        for quantity in QUANTITIES:
            self._sources[quantity] = [
                ParameterTableSource(
                    series,
                    np.array(
                        [self._indices.get(c.name, -1) for c in series.table.columns], np.intp
                    ),
                )
                for series in snapshot.history.tables_named(quantity)
            ]

    def _read(self, snapshot: Snapshot, quantity: str, count: int) -> None:
        values = np.full(count, np.nan, np.float32)
        self.provisional[quantity] = False
        for source in self._sources[quantity]:
            row, provisional = newest_row(snapshot, source.series)
            self.provisional[quantity] |= provisional
            if row is not None:
                known = source.parameters >= 0
                values[source.parameters[known]] = row[known]
        self.newest[quantity] = values

    def _read_events(self, snapshot: Snapshot) -> None:
        newest_first = reversed(snapshot.events)
        new = list(takewhile(lambda event: event.id >= self._next_event, newest_first))
        for event in reversed(new):
            if isinstance(event, NonFinite) and event.parameter in self._indices:
                self.last_nonfinite[self._indices[event.parameter]] = event
        if new:
            self._next_event = new[0].id + 1

    def why_absent(self, parameter: int) -> str:
        """Why the gradient of a parameter, or another quantity of it, has no value."""
        for quantity in QUANTITIES:
            values = self.newest.get(quantity, ())
            why = why_absent(float(values[parameter])) if parameter < len(values) else None
            if why is not None:
                return why.reason
        return ""

    def warning(self, parameter: int) -> str:
        """What is unhealthy about the newest values of a parameter, in words; "" for nothing."""
        found = []
        ratios, norms = self.newest[schema.UPDATE_RATIO], self.newest[schema.GRAD_NORM]
        if parameter < len(norms) and norms[parameter] == 0:
            found.append("its gradient is zero")
        if parameter < len(ratios) and (words := UPDATE_RATIO.describe(float(ratios[parameter]))):
            found.append(f"update {words}")
        return ", ".join(found)

    @property
    def unhealthy_updates(self) -> int:
        """How many update ratios lie outside the healthy band."""
        ratios = self.newest.get(schema.UPDATE_RATIO, np.empty(0, np.float32))
        assert UPDATE_RATIO.low is not None
        assert UPDATE_RATIO.high is not None
        known = ratios[np.isfinite(ratios)]
        return int(((known < UPDATE_RATIO.low) | (known > UPDATE_RATIO.high)).sum())

    def measured(self, quantity: str) -> NDArray[np.bool_]:
        """Whether `quantity` of each parameter has been measured at all, (parameters,)."""
        measured = np.zeros(len(self.newest[quantity]), np.bool_)
        for source in self._sources.get(quantity, ()):
            if source.series.rows:
                measured[source.parameters[source.parameters >= 0]] = True
        return measured

    def series(self, quantity: str, parameter: int) -> tuple[SeriesReader, int] | None:
        """The series and column of `quantity` of one parameter; None before its first value."""
        for source in self._sources.get(quantity, ()):
            found = np.flatnonzero(source.parameters == parameter)
            if len(found) and source.series.rows:
                return source.series, int(found[0])
        return None

    @property
    def shares(self) -> Values:
        """‖gᵢ‖² / Σ‖g‖² of each parameter, (parameters,), over those with a finite norm; all nan
        when the norms are those of shards."""
        squares = np.square(self.newest[schema.GRAD_NORM].astype(np.float64))
        total = squares[np.isfinite(squares)].sum()
        if self._sharded or not total > 0:
            return np.full(len(squares), np.nan, np.float32)
        return np.asarray(squares / total, np.float32)

    def maxima(
        self, quantity: str, parameters: Sequence[int] | Indices, buckets: int
    ) -> tuple[Values, NDArray[np.bool_]]:
        """The highest value in each of `buckets` equal parts of the run so far, and whether any was
        not finite; both (parameters, buckets). At most as many parts are filled as there are
        rows."""
        wanted = np.asarray(parameters, np.int64)
        high = np.full((len(wanted), buckets), np.nan, np.float32)
        nonfinite = np.zeros((len(wanted), buckets), np.bool_)
        for source in self._sources.get(quantity, ()):
            series = source.series
            if not series.rows or not len(source.parameters):
                continue
            order = np.argsort(source.parameters)
            at = np.searchsorted(source.parameters, wanted, sorter=order)
            columns = order[np.minimum(at, len(order) - 1)]
            here = np.flatnonzero(source.parameters[columns] == wanted)
            if not len(here):
                continue
            start, stop = series.first_step or 0, (series.last_step or 0) + 1
            filled = min(buckets, series.rows)  # no gaps between rare measurements
            window = series.window(columns[here].tolist(), start, stop, filled)
            high[here, :filled] = window.high.T
            nonfinite[here, :filled] = window.nonfinite.T
        return high, nonfinite


class ParameterTable(VirtualTable):
    """A row for each parameter; row ids are indices in `RunInfo.parameters`."""

    lessons = ("gradient", "param-groups")

    def __init__(self, values: ParameterValues, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.values = values
        self.filter = ""
        self.sorted_by = MODEL_ORDER
        self.first_column = 0
        """Columns after the name that are scrolled out of view."""
        self.element_count = 0
        """Elements of all parameters together."""
        self._name_column = TableColumn("name", "parameter", 0, self._name_cell, left=True)
        self._value_columns = self._columns()
        self.columns = (self._name_column, *self._value_columns)
        self._parameters: tuple[ParameterInfo, ...] = ()
        self._names: tuple[str, ...] = ()
        self._longest_name = MIN_NAME_WIDTH
        self._matching: tuple[str, RowIds] | None = None
        """The filter, and the parameters that match it."""
        self._trends: dict[int, str] = {}
        self._trend_width = TREND_WIDTH
        self._shares: Values = np.empty(0, np.float32)
        self._measured: dict[str, NDArray[np.bool_]] = {}

    def _columns(self) -> tuple[TableColumn, ...]:
        scientific, percent, dim = formatting.scientific, formatting.percent, "dim"
        return (
            TableColumn(
                "grad", "grad norm", 9, self._newest(schema.GRAD_NORM),
                tooltip="‖∂L/∂p‖₂ before clipping",
            ),
            TableColumn(
                "trend", "trend", TREND_WIDTH, self._trend_cell, style="norm", left=True,
                tooltip="Largest gradient norm over the run",
            ),
            TableColumn(
                "share", "share", 6, self._share_cell, percent,
                tooltip="‖g‖² as a share of the total norm²",
            ),
            TableColumn(
                "update", "update", 8, self._newest(schema.UPDATE_RATIO), scientific,
                tooltip=f"‖Δw‖ / ‖w‖ of a step; {UPDATE_RATIO.words}",
            ),
            TableColumn(
                "weight", "‖w‖", 9, self._newest(schema.WEIGHT_NORM), tooltip="Norm of the weights"
            ),
            TableColumn(
                "nonfinite", "non-finite", 10, self._nonfinite_cell,
                tooltip="nan or inf now, or the step at which it was last seen",
            ),
            TableColumn(
                "numel", "numel", 7, self._numel_cell, formatting.count, dim,
                tooltip="Number of elements",
            ),
            TableColumn(
                "shape", "shape", 15, self._shape_cell, style=dim, left=True,
                tooltip="Shape of the tensor",
            ),
            TableColumn(
                "dtype", "dtype", 8, self._dtype_cell, style=dim, left=True,
                tooltip="Type of its elements",
            ),
            TableColumn(
                "optimizer", "optimizer", 10, self._optimizer_cell, style=dim, left=True,
                tooltip="The optimizer that updates it",
            ),
        )  # fmt: skip

    @property
    def sort_keys(self) -> tuple[str, ...]:
        """Keys of the columns that the table can be sorted by."""
        return (MODEL_ORDER, *(c.key for c in self.columns_by_key.values() if c.key != "trend"))

    @property
    def columns_by_key(self) -> dict[str, TableColumn]:
        """All columns, in view or not."""
        return {column.key: column for column in (self._name_column, *self._value_columns)}

    # ------------------------------------------------------------ order

    def parameters_changed(self) -> None:
        """Read the names of the parameters again."""
        info = self.values.info
        self._parameters = info.parameters if info else ()
        self._names = tuple(parameter.name.casefold() for parameter in self._parameters)
        self._longest_name = max(map(len, self._names), default=MIN_NAME_WIDTH)
        self.element_count = sum(parameter.numel for parameter in self._parameters)
        self._matching = None

    def rearrange(self, to_top: bool = False) -> None:
        """Filter and sort the parameters again; `to_top`: the cursor goes to the first."""
        order = self._matching_parameters()
        if self.sorted_by != MODEL_ORDER and len(order):
            order = order[_argsort(self._sort_values(order), self.descending)]
        elif not self.descending:
            order = order[::-1]
        self.set_order(order, to_top)

    def _matching_parameters(self) -> RowIds:
        """The parameters whose name contains every word of the filter."""
        if self._matching is None or self._matching[0] != self.filter:
            words, names = self.filter.casefold().split(), enumerate(self._names)
            rows = [row for row, name in names if all(word in name for word in words)]
            self._matching = (self.filter, np.array(rows, np.int64))
        return self._matching[1]

    def _sort_values(self, rows: RowIds) -> NDArray[np.generic]:
        values = self.values
        match self.sorted_by:
            case "grad":
                return values.newest[schema.GRAD_NORM][rows]
            case "share":
                return values.shares[rows]
            case "update":
                return values.newest[schema.UPDATE_RATIO][rows]
            case "weight":
                return values.newest[schema.WEIGHT_NORM][rows]
            case "nonfinite":
                return self._nonfinite_severity()[rows]
            case "shape":
                return np.array([str(self._parameters[row].shape) for row in rows])
        return np.array([getattr(self._parameters[row], self.sorted_by) for row in rows])

    def _nonfinite_severity(self) -> NDArray[np.float32]:
        """Infinite for parameters with a quantity that is not finite now, else the step at which
        one last was; 0 for never."""
        severity = np.zeros(len(self._names), np.float32)
        for row, event in self.values.last_nonfinite.items():
            severity[row] = event.step
        for quantity in QUANTITIES:
            newest = self.values.newest[quantity]
            bad = self.values.measured(quantity) & ~np.isfinite(newest) & ~absent_mask(newest)
            severity[bad] = np.inf
        return severity

    def scroll_columns(self, by: int) -> None:
        """Show columns further right, or further left."""
        self.first_column = min(max(self.first_column + by, 0), len(self._value_columns) - 1)
        self.columns = (self._name_column, *self._value_columns[self.first_column :])
        self.update_rows()

    # ------------------------------------------------------------ drawing

    def visible_columns(self, width: int) -> tuple[list[TableColumn], list[int]]:
        """The columns that fit. Names are not cut if there is room, since they often differ only in
        the middle; the trend takes some of the rest."""
        name = min(self._longest_name, max(MIN_NAME_WIDTH, int(width * MAX_NAME_SHARE)))
        columns, widths, left = [self.columns[0]], [name], width - 1 - name
        for column in self.columns[1:]:
            if column.width < left:
                columns.append(column)
                widths.append(column.width)
                left -= column.width + 1
        widened = max(0, min(left, self._longest_name - name))
        widths[0] += widened
        keys = [column.key for column in columns]
        if "trend" in keys:
            index = keys.index("trend")
            widths[index] += max(0, min(left - widened, MAX_TREND_WIDTH - TREND_WIDTH))
            self._trend_width = widths[index]
        return columns, widths

    def prepare(self, visible: RowIds) -> None:
        """Draw the trends of the rows in view, from one read of the history."""
        high, nonfinite = self.values.maxima(schema.GRAD_NORM, visible, self._trend_width)
        lines = sparklines(high, nonfinite, self.glyphs, hold=True)
        self._trends = dict(zip(visible.tolist(), lines, strict=True))
        self._shares = self.values.shares
        self._measured = {quantity: self.values.measured(quantity) for quantity in QUANTITIES}

    def _name_cell(self, row: int) -> Cell:
        parameter = self._parameters[row]
        return Cell(parameter.name, "text" if parameter.trainable else "dim")

    def _newest(self, quantity: str) -> Callable[[int], Cell | float | None]:
        def value(row: int) -> Cell | float | None:
            newest = float(self.values.newest[quantity][row])
            if not np.isfinite(newest) and not self._measured[quantity][row]:
                return None
            if quantity == schema.UPDATE_RATIO and not UPDATE_RATIO.holds(newest):
                return Cell(newest, "warning")
            if quantity == schema.GRAD_NORM and newest == 0:
                return Cell(newest, "warning")
            return Cell(newest, "provisional") if self.values.provisional[quantity] else newest

        return value

    def _share_cell(self, row: int) -> float | None:
        share = float(self._shares[row])
        return share if np.isfinite(share) else None

    def _trend_cell(self, row: int) -> str:
        return self._trends.get(row, "")

    def _nonfinite_cell(self, row: int) -> Cell | float | None:
        for quantity in QUANTITIES:
            value = float(self.values.newest[quantity][row])
            measured = self._measured[quantity][row] and why_absent(value) is None
            if measured and not np.isfinite(value):
                return value
        event = self.values.last_nonfinite.get(row)
        return Cell(f"at {event.step:,}", "warning") if event is not None else None

    def _numel_cell(self, row: int) -> float:
        return self._parameters[row].numel

    def _shape_cell(self, row: int) -> str:
        return format_shape(self._parameters[row], self.glyphs.times)

    def _dtype_cell(self, row: int) -> str:
        return self._parameters[row].dtype

    def _optimizer_cell(self, row: int) -> str:
        parameter = self._parameters[row]
        return parameter.optimizer or ("" if parameter.trainable else "frozen")


def format_shape(parameter: ParameterInfo, times: str) -> str:
    """`64 × 256`, or `scalar`."""
    return f" {times} ".join(map(str, parameter.shape)) or "scalar"


def _argsort(values: NDArray[np.generic], descending: bool) -> RowIds:
    """A stable sort. nan comes last in either direction; infinity is the largest number."""
    if values.dtype.kind == "f":
        numbers = values.astype(np.float64)
        unknown = np.isnan(numbers)
        numbers = np.where(unknown, np.inf, -numbers if descending else numbers)
        return np.lexsort((numbers, unknown)).astype(np.int64)
    order = np.argsort(values, kind="stable").astype(np.int64)
    return order[::-1] if descending else order

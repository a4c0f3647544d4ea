"""Layers × one statistic, with the trend of each part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.segment import Segment
from rich.style import Style

from tui_trainer.history.table import TableHistory
from tui_trainer.protocol import tables
from tui_trainer.protocol.describe import AttentionInfo
from tui_trainer.session.api import Snapshot
from tui_trainer.ui import formatting
from tui_trainer.ui.panels.attention_statistics import STATISTICS, STYLES, Statistic
from tui_trainer.ui.panels.attention_values import LayerValues, NewestValues
from tui_trainer.ui.panels.query_key_value import NOT_COMPARABLE, short_layer
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.sparkline import sparklines
from tui_trainer.ui.widgets.table import Ids, TableColumn, VirtualTable, fitted

VALUE = 9
WIDEST_TREND, NARROWEST_TREND = 40, 6
_BY_KEY = {statistic.key: statistic for statistic in STATISTICS}
HEADLINES = (("growth", ""), ("cos", "qk"), ("max_logit", ""), ("entropy", ""), ("grad_cos", "qk"))
"""What is shown beside the chosen statistic where there is room."""
SHORT = {"cos": "cos", "grad_cos": "∇ cos"}


def shown(statistic: Statistic, value: float | None, width: int, comparable: bool = True) -> str:
    """A value as its statistic is written; n/a where a comparison has no meaning."""
    if value is not None and value != value and not comparable:
        return NOT_COMPARABLE.rjust(width)
    if statistic.signed:
        return formatting.signed(value, width, 4)
    return formatting.number(value, width)


class StatisticTable(VirtualTable):
    """Rows are attention layers."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.snapshot = Snapshot()
        self.statistic = STATISTICS[0]
        self.filter = ""
        self.sorted_by = "order"
        self._newest = [
            NewestValues(name)
            for name in (tables.ATTENTION, tables.ATTENTION_SPECTRUM, tables.ATTENTION_HEALTH)
        ]
        self._latest: dict[str, LayerValues] = {}
        self._trends: dict[tuple[int, str], str] = {}
        self._trend_width = 0
        self._matched: tuple[str, tuple[AttentionInfo, ...], Ids, int] | None = None

    def show(self, snapshot: Snapshot) -> None:
        """Take the newest values."""
        self.snapshot = snapshot
        self._latest = {}
        for newest in self._newest:
            values = newest.read(snapshot)
            if values is not None:
                self._latest[newest.name] = values
        self.rearrange()
        self.update_rows()

    def choose(self, statistic: Statistic) -> None:
        """Show another statistic."""
        self.statistic = statistic
        if self.sorted_by not in ("order", *statistic.parts):
            self.sorted_by = "order"
        self.rearrange()
        self.update_rows()

    def rearrange(self) -> None:
        """Filter and sort anew; the cursor stays on its layer."""
        order = self._matching()
        if self.sorted_by != "order" and len(order):
            part = self.sorted_by if self.sorted_by in self.statistic.parts else ""
            values = [self.value(self.statistic, int(layer), part) for layer in order]
            keys = np.array([np.nan if v is None else v for v in values], np.float64)
            keys = np.where(np.isnan(keys), np.inf, -keys if self.descending else keys)
            order = order[np.argsort(keys, kind="stable")]
        elif not self.descending:
            order = order[::-1]
        self.set_order(order)

    def _matching(self) -> Ids:
        """The layers whose name has all words of the filter."""
        info = self.snapshot.info
        layers = info.attention if info else ()
        if self._matched is None or self._matched[:2] != (self.filter, layers):
            words = self.filter.casefold().split()
            names = [layer.layer.casefold() for layer in layers]
            found = [i for i, name in enumerate(names) if all(word in name for word in words)]
            longest = max((len(short_layer(layer.layer)) for layer in layers), default=7)
            self._matched = (self.filter, layers, np.array(found, np.int64), longest)
        return self._matched[2]

    def value(self, statistic: Statistic, layer: int, part: str) -> float | None:
        """The newest value; None before the first."""
        known = self._latest.get(statistic.table)
        return known.value(layer, statistic.index(part)) if known else None

    # ------------------------------------------------------------ drawing

    def visible_columns(self, width: int) -> tuple[list[TableColumn], list[int]]:
        """The name, value and trend of each part, then headlines where there is room."""
        parts = self.statistic.parts
        longest = self._matched[3] if self._matched else 7
        name = min(max(7, longest) + 1, max(12, width // 4))
        room = width - 2 - name - len(parts) * (VALUE + 2)
        headlines = [(k, p) for k, p in HEADLINES if k != self.statistic.key]
        while headlines and room - len(headlines) * 10 < len(parts) * 16:
            headlines.pop()
        room -= len(headlines) * 10
        trend = min(WIDEST_TREND, room // len(parts))
        self._trend_width = trend if trend >= NARROWEST_TREND else 0
        columns, widths = [TableColumn("layer", "layer", name, left=True)], [name]
        for part in parts:
            title = part or self.statistic.title
            columns.append(TableColumn(part or "value", title, VALUE, style=STYLES[part]))
            widths.append(VALUE)
            if self._trend_width:
                columns.append(TableColumn(f"trend {part}", "", trend, left=True))
                widths.append(trend)
        for key, part in headlines:
            title = f"{SHORT.get(key, _BY_KEY[key].title)} {part}".strip()
            columns.append(TableColumn(f"{key} {part}", title, 9))
            widths.append(9)
        return columns, widths

    def prepare(self, visible: Ids) -> None:
        """Trends of the layers in sight, in one look at the history."""
        self._trends = {}
        info = self.snapshot.info
        if info is None or not self._trend_width:
            return
        wanted: dict[TableHistory, list[tuple[int, str, int]]] = {}
        for layer in visible:
            place = self.statistic.place(self.snapshot, info.attention[layer])
            for part in self.statistic.parts:
                if place is not None and self._comparable(int(layer), part):
                    column = place.columns[self.statistic.index(part)]
                    wanted.setdefault(place.history, []).append((int(layer), part, column))
        for history, cells in wanted.items():
            self._draw_trends(history, cells)

    def _draw_trends(self, history: TableHistory, cells: Sequence[tuple[int, str, int]]) -> None:
        """`cells`: layer, part and column."""
        start, stop = history.first_step or 0, (history.last_step or 0) + 1
        buckets = min(self._trend_width, history.rows)  # no gaps between rare measurements
        if not buckets:
            return
        seen = history.window([column for _, _, column in cells], start, stop, buckets)
        lines = sparklines(seen.high.T, seen.nonfinite.T, self.glyphs, hold=True)
        for (layer, part, _), line in zip(cells, lines, strict=True):
            self._trends[layer, part] = line

    def cells(self, row: int, columns: Sequence[TableColumn], widths: Sequence[int]) -> Row:
        """One layer."""
        info, palette = self.snapshot.info, self.palette
        assert info is not None
        cells: Row = []
        for column, width in zip(columns, widths, strict=True):
            kind, _, part = column.key.partition(" ")
            if kind == "layer":
                layer = info.attention[row]
                name = short_layer(layer.layer) + ("*" if layer.note else "")
                cells.append(Segment(fitted(name, width, True), palette.text))
            elif kind == "trend":
                line = self._trends.get((row, part), "")
                cells.append(Segment(line.ljust(width), getattr(palette, STYLES[part])))
            elif part or kind in _BY_KEY:
                cells.append(self._number(_BY_KEY[kind], row, part, width, palette.dim))
            else:
                part = "" if kind == "value" else kind
                style = getattr(palette, STYLES[part])
                cells.append(self._number(self.statistic, row, part, width, style))
        return cells

    def _number(
        self, statistic: Statistic, row: int, part: str, width: int, style: Style
    ) -> Segment:
        value, comparable = self.value(statistic, row, part), self._comparable(row, part)
        text = shown(statistic, value, width, comparable)
        if value is None or (value != value and not comparable):
            return Segment(text, self.palette.faint)
        if not np.isfinite(value):
            return Segment(text, self.palette.error)
        if self._latest[statistic.table].provisional[row]:
            return Segment(text, self.palette.provisional)
        return Segment(text, style)

    def _comparable(self, layer: int, part: str) -> bool:
        info = self.snapshot.info
        return info is None or info.attention[layer].comparable(part)

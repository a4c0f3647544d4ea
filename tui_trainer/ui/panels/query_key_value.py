"""Wq, Wk and Wv: how alike they are in each layer, how far each has drifted, and the trend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size

from tui_trainer.history.layers import place_of
from tui_trainer.protocol import tables
from tui_trainer.session.api import Snapshot
from tui_trainer.ui import formatting as f
from tui_trainer.ui.panels.ages import age_of
from tui_trainer.ui.panels.attention_values import LayerValues, NewestValues
from tui_trainer.ui.panels.base import (
    FIRST_STEP,
    Item,
    Panel,
    title_row,
    unseen,
)
from tui_trainer.ui.panels.loss import SMOOTHED_SHARE, smoothed
from tui_trainer.ui.theme import Palette
from tui_trainer.ui.widgets.chart import Band, Chart, Label, Layer, Line
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.scale import window
from tui_trainer.ui.widgets.table import TableColumn, VirtualTable, fitted

STATISTICS = tables.ATTENTION_STATISTICS
TRENDS = (
    ("drift", "drift from the start ‖W−W₀‖/‖W₀‖", ("q", "k", "v")),
    ("cos", "cosine between weights", ("qk", "qv", "kv")),
    ("distance", "distance ‖Wa−Wb‖/√(‖Wa‖²+‖Wb‖²)", ("qk", "qv", "kv")),
    ("norm", "norm ‖W‖", ("q", "k", "v")),
    ("grad_cos", "cosine between gradients", ("qk", "qv", "kv")),
)
"""Statistic, its name for people, and its parts."""
NOT_COMPARABLE = "n/a"

COLUMNS = (
    TableColumn("layer", "layer", 0, left=True),
    TableColumn("cos_qk", "cos qk", 6),
    TableColumn("cos_qv", "cos qv", 6),
    TableColumn("cos_kv", "cos kv", 6),
    TableColumn("drift_q", "drift q", 7, style="q"),
    TableColumn("drift_k", "k", 6, style="k"),
    TableColumn("drift_v", "v", 6, style="v"),
    TableColumn("growth", "growth", 6, tooltip="(‖Wq‖‖Wk‖/‖Wv‖) against the start"),
    TableColumn("distance_qk", "dist qk", 7),
    TableColumn("grad_cos_qk", "∇cos qk", 7),
    TableColumn("norm_q", "‖Wq‖", 7, style="q"),
    TableColumn("norm_k", "‖Wk‖", 7, style="k"),
    TableColumn("norm_v", "‖Wv‖", 7, style="v"),
)


def pair_style(palette: Palette, part: str) -> Style:
    """q, k and v in their colours; a pair in the colour of the one that it lacks."""
    missing = {"qk": "v", "qv": "k", "kv": "q"}
    return palette.series(missing.get(part, part))


class LayersTable(VirtualTable):
    """Layers × statistics."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(COLUMNS, id=id)
        self.snapshot = Snapshot()
        self.heading = 1
        self._newest = NewestValues(tables.ATTENTION)
        self._values: LayerValues | None = None

    def show(self, snapshot: Snapshot) -> None:
        """Take the snapshot and redraw."""
        self.snapshot = snapshot
        layers = len(snapshot.info.attention) if snapshot.info else 0
        self._values = self._newest.read(snapshot)
        if len(self.order) != layers:
            self.set_order(np.arange(layers))
        nothing = "no attention layer was found in this model"
        self.empty = unseen(snapshot, "attention") or (
            nothing if snapshot.status.step and not layers else FIRST_STEP
        )
        self.update_rows()

    def head(self, width: int) -> list[Row]:
        """The title."""
        palette = self.palette
        items: list[Item] = [("", "Wq", palette.q), ("", "Wk", palette.k), ("", "Wv", palette.v)]
        layers = len(self.order)
        if layers:
            items.append(("", f"{layers:,} layer{'' if layers == 1 else 's'}", palette.dim))
        histories = self.snapshot.history.of_every_optimizer(tables.ATTENTION)
        return [title_row(self, width, "Attention", items, age_of(self.snapshot, histories))]

    def cells(self, row: int, columns: Sequence[TableColumn], widths: Sequence[int]) -> Row:
        """One layer."""
        palette, info = self.palette, self.snapshot.info
        out: Row = []
        for column, width in zip(columns, widths, strict=True):
            if column.key == "layer":
                name = info.attention[row].layer if info else ""
                note_sign = "*" if info and info.attention[row].note else ""
                out.append(
                    Segment(fitted(short_layer(name) + note_sign, width, True), palette.text)
                )
                continue
            value = self._value(row, column.key)
            out.append(Segment(self._text(row, column, value, width), self._style(row, column)))
        return out

    def _value(self, row: int, statistic: str) -> float | None:
        if self._values is None:
            return None
        return self._values.value(row, STATISTICS.index(statistic))

    def _text(self, row: int, column: TableColumn, value: float | None, width: int) -> str:
        info, part = self.snapshot.info, column.key.rpartition("_")[2]
        missing = value is not None and value != value
        if missing and info and not info.attention[row].comparable(part):
            return NOT_COMPARABLE.rjust(width)
        return _shown(column.key, value, width)

    def _style(self, row: int, column: TableColumn) -> Style:
        palette, value = self.palette, self._value(row, column.key)
        if value is None or not np.isfinite(value):
            return palette.dim
        if self._values is not None and self._values.provisional[row]:
            return palette.provisional
        letter = column.key[-1]
        colored = column.key.startswith(("drift", "norm"))
        return palette.series(letter) if colored else palette.text


class TrendPanel(Panel):
    """One statistic of the highlighted layer over the run: three lines, always the same colours."""

    quantity = "attention"

    def __init__(self, trend: int = 0, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.chart = Chart()
        self.shown_layer = 0
        self.trend = trend

    def cycle(self) -> str:
        """Show the next statistic; its name."""
        self.trend = (self.trend + 1) % len(TRENDS)
        self.chart = Chart()
        self.update_rows()
        return TRENDS[self.trend][1]

    def title(self, width: int, items: Sequence[Item] = (), right: str = "") -> Row:
        """The statistic's name and the newest values."""
        return title_row(
            self, width, TRENDS[self.trend][0].replace("grad_cos", "∇cos"), items, right
        )

    def rows(self, size: Size) -> Sequence[Row]:
        """Blank where the reason is already said in the table above."""
        return [] if unseen(self.snapshot, self.quantity) else self.content(size)

    def content(self, size: Size) -> Sequence[Row]:
        """Title and chart."""
        info, palette = self.snapshot.info, self.palette
        if size.height < 5:
            return []
        step = self.snapshot.history.table(tables.STEP)  # the same window as the loss has
        last = (step.last_step or 0) if step is not None else 0
        steps = window(last, None, info.total_steps if info else None, self.frugal)
        name, _, parts = TRENDS[self.trend]
        layers: list[Layer] = []
        names: list[Layer] = []
        items: list[Item] = []
        layer = min(self.shown_layer, max(0, len(info.attention) - 1)) if info else 0
        buckets = 2 * self.chart.plot_width(size.width)
        place = None
        if info and info.attention:
            shown = info.attention[layer].layer
            place = place_of(self.snapshot.history, tables.ATTENTION, shown)
        if place is not None and place.history.rows:
            history, columns = place
            wanted = [columns[STATISTICS.index(f"{name}_{part}")] for part in parts]
            seen = history.window(wanted, *steps, buckets)
            latest = history.latest()
            for number, part in enumerate(parts):
                style = pair_style(palette, part)
                if info and not info.attention[layer].comparable(part):
                    items.append((part, NOT_COMPARABLE.rjust(7), palette.faint))
                    continue
                band = Band.of(seen, number, style)
                if name == "grad_cos":  # it scatters too much to be read but for its mean
                    mean = smoothed(band.low, band.high, max(2.0, buckets * SMOOTHED_SHARE))
                    layers.append(Line(style, mean, band.bad))
                    band = replace(band, high=mean)
                else:
                    layers.append(band)
                ends = np.flatnonzero(np.isfinite(band.high))
                if len(ends):
                    end = int(ends[-1])
                    names.append(Label(style, end, float(band.high[end]), part))
                if latest is not None:
                    value = float(latest[1][wanted[number]])
                    items.append((part, _shown(f"{name}_{part}", value, 7), style))
        right = short_layer(info.attention[layer].layer) if info and info.attention else ""
        layers += names
        if right and name == "grad_cos":
            right = f"{right} {self.glyphs.separator} mean"
        rows = self.chart.rows(size.width, size.height - 1, steps, layers, palette, self.glyphs)
        return [self.title(size.width, items, right), *rows]


def short_layer(name: str) -> str:
    """`blocks.0.attention` as `blocks.0`: the last part is the same in every layer."""
    head, _, last = name.rpartition(".")
    return head if head and not last.isdigit() else name


def _shown(statistic: str, value: float | None, width: int) -> str:
    if statistic.startswith(("cos", "grad_cos")):
        return f.signed(value, width, 3)
    return f.number(value, width, 4 if width > 6 else 3)

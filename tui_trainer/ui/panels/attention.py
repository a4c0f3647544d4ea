"""Wq, Wk and Wv: how alike they are in each layer, how far each has drifted, and the trend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size

from tui_trainer.client.api import Snapshot
from tui_trainer.history.analysis import (
    STATISTICS,
    LayerLocation,
    attention_tables,
    layers_in,
    location_of,
)
from tui_trainer.history.analysis import STATISTICS as COLUMNS
from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import formatting, schema
from tui_trainer.protocol import formatting as f
from tui_trainer.protocol.schema import AttentionInfo
from tui_trainer.ui.panels.base import FIRST_STEP, Item, Panel, provisional, title_row, unseen
from tui_trainer.ui.panels.loss import SMOOTHED_SHARE, smoothed
from tui_trainer.ui.panels.series_chart import ChartSeries
from tui_trainer.ui.theme import Palette
from tui_trainer.ui.widgets.braille import sparklines
from tui_trainer.ui.widgets.chart import Band, Chart, Label, Layer, Line
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.scale import window
from tui_trainer.ui.widgets.table import Ids, TableColumn, VirtualTable, fitted
from tui_trainer.ui.widgets.text import age_of

# ---- attention_statistics
# The statistics of attention layers: what each means, what is healthy, where its values are.


MATRICES = ("q", "k", "v")
PAIRS = ("qk", "qv", "kv")
STYLES = {"q": "q", "k": "k", "v": "v", "qk": "v", "qv": "k", "kv": "q", "": "norm"}
"""Wq, Wk and Wv have the same colours everywhere; a pair has that of the one that it lacks."""


@dataclass(frozen=True)
class Statistic:
    """One quantity of every attention layer, for q, k, v, for their pairs, or for the layer."""

    key: str
    title: str
    table: str
    parts: tuple[str, ...]
    means: str
    healthy: str
    signed: bool = False

    def column(self, part: str) -> str:
        """Name of the column within its layer's."""
        return f"{self.key}_{part}" if part else self.key

    def index(self, part: str) -> int:
        """Its number among a layer's columns."""
        return COLUMNS[self.table].index(self.column(part))

    def place(self, snapshot: Snapshot, layer: AttentionInfo) -> LayerLocation | None:
        """Where a layer is: in the table of the optimizer that trains it."""
        return location_of(snapshot.history, self.table, layer.layer)

    def series(self, layer: AttentionInfo, place: LayerLocation) -> list[ChartSeries]:
        """Its curves for one layer, less those of pairs whose comparison has no meaning."""
        return [
            ChartSeries(part, STYLES[part], place.columns[self.index(part)])
            for part in self.parts
            if layer.comparable(part)
        ]


SHOWN_STATISTICS = (
    Statistic(
        "drift", "drift", schema.ATTENTION, MATRICES,
        "‖W−W₀‖/‖W₀‖: how far each matrix has moved from its initialisation",
        "rises fast, then levels off; q and k alike, v slower",
    ),
    Statistic(
        "cos", "cosine", schema.ATTENTION, PAIRS,
        "⟨Wa,Wb⟩/(‖Wa‖‖Wb‖): 1 the same direction, 0 unrelated, as at a random start",
        "near 0; q and k may align slowly, a jump is worth a look", True,
    ),
    Statistic(
        "distance", "distance", schema.ATTENTION, PAIRS,
        "‖Wa−Wb‖/√(‖Wa‖²+‖Wb‖²): 1 for unrelated matrices, 0 for equal ones",
        "near 1; towards 0 two projections do the same work",
    ),
    Statistic(
        "norm", "norm", schema.ATTENTION, MATRICES,
        "‖W‖ (Frobenius): the size of each projection",
        "grows slowly; q and k that run away blow up the logits",
    ),
    Statistic(
        "grad_cos", "∇ cosine", schema.ATTENTION, PAIRS,
        "the cosine between the gradients of two projections: why they part or align",
        "noise around 0; a lasting + moves the two together, a − apart", True,
    ),
    Statistic(
        "growth", "growth", schema.ATTENTION, ("",),
        "‖Wq‖‖Wk‖/‖Wv‖ against the start: early sign of attention logits that blow up",
        "1 to a few; a steep rise comes before entropy collapses",
    ),
    Statistic(
        "sigma_max", "σ max", schema.ATTENTION_SPECTRUM, MATRICES,
        "the largest singular value: the most that the matrix can stretch a vector",
        "grows slowly; a single one that runs away is a spectral spike",
    ),
    Statistic(
        "stable_rank", "stable rank", schema.ATTENTION_SPECTRUM, MATRICES,
        "‖W‖²/σ_max²: how many directions carry the matrix, robust to small ones",
        "falls as structure is learned; near 1 one direction does it all",
    ),
    Statistic(
        "effective_rank", "effective rank", schema.ATTENTION_SPECTRUM, MATRICES,
        "exp(entropy of σ/Σσ), Roy & Vetterli 2007: how many directions are in use",
        "stays a good share of the width; a collapse loses capacity",
    ),
    Statistic(
        "max_logit", "max logit", schema.ATTENTION_HEALTH, ("",),
        "the largest attention logit q·k/√d of a sampled batch",
        "below about 50; beyond it softmax saturates and gradients vanish",
    ),
    Statistic(
        "entropy", "entropy", schema.ATTENTION_HEALTH, ("",),
        "mean entropy of the attention rows in nats: how spread the attention is",
        "above 0 (one token alone), below ln of the context (all alike)",
    ),
    Statistic(
        "cos_qk_activations", "cos(q, k)", schema.ATTENTION_HEALTH, ("",),
        "mean cosine between the queries and keys themselves, not their weights",
        "small; near 1 every query looks at every key alike", True,
    ),
    Statistic(
        "std", "std", schema.ATTENTION, MATRICES,
        "standard deviation of the matrix' entries",
        "starts at the initialisation's and follows the norm",
    ),
    Statistic(
        "mean", "mean", schema.ATTENTION, MATRICES,
        "mean of the matrix' entries",
        "stays near 0: a lasting offset is unusual", True,
    ),
)  # fmt: skip
"""In the order in which the screen offers them."""


def why_nothing(statistic: Statistic, snapshot: Snapshot, optimizer: str = "") -> str:
    """What to say where `statistic` has no values for the layers that `optimizer` trains (as
    `Table.optimizer` names it)."""
    info = snapshot.info
    if info is not None:
        name = optimizer or next(iter(info.optimizers), "")
        for key in (
            statistic.table,
            f"{statistic.table}@{name}",
            statistic.column(statistic.parts[0]),
            "attention",
        ):
            if key in info.unseen:
                return info.unseen[key]
        if snapshot.status.step and not info.attention:
            return "no attention layer was found in this model"
    if snapshot.status.ended:
        return "the run ended before this was measured"
    if snapshot.status.step and statistic.table != schema.ATTENTION:
        return "measured now and then, more often while this is open: a value is on its way"
    return "waiting for the first step"


# ---- attention_values
# The newest values of every attention layer, whichever optimizer's table they are in.


Layers = tuple[AttentionInfo, ...]
Numbers = NDArray[np.intp]


@dataclass(frozen=True)
class LayerValues:
    """One statistic table's newest values, in the order of `RunInfo.attention`."""

    values: NDArray[np.float32]
    """(layers, statistics); NaN also where nothing was measured."""
    measured: NDArray[np.bool_]
    """(layers,)"""
    provisional: NDArray[np.bool_]
    """(layers,): whether it is of the step in the making."""

    def value(self, layer: int, statistic: int) -> float | None:
        """None before the first."""
        if layer >= len(self.measured) or not self.measured[layer]:
            return None
        return float(self.values[layer, statistic])


class NewestValues:
    """Reads the tables of one name. Which layers a table has is found out once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._width = len(STATISTICS[name])
        self._known: WeakKeyDictionary[SeriesReader, tuple[Layers, Numbers, Numbers]]
        self._known = WeakKeyDictionary()

    def read(self, snapshot: Snapshot) -> LayerValues | None:
        """None before the first row of any."""
        layers = snapshot.info.attention if snapshot.info else ()
        found = LayerValues(
            np.full((len(layers), self._width), np.nan, np.float32),
            np.zeros(len(layers), np.bool_),
            np.zeros(len(layers), np.bool_),
        )
        for history in attention_tables(snapshot.history, self.name):
            fresh, newest = provisional(snapshot, history), history.latest()
            row = fresh if fresh is not None else newest[1] if newest is not None else None
            if row is None:
                continue
            here, there = self._where(history, layers)
            if len(here):
                found.values[here] = row.reshape(-1, self._width)[there]
                found.measured[here] = True
                found.provisional[here] = fresh is not None
        return found if found.measured.any() else None

    def _where(self, history: SeriesReader, layers: Layers) -> tuple[Numbers, Numbers]:
        """The layers that this table has: their numbers in the run, and in the table."""
        known = self._known.get(history)
        if known is None or known[0] is not layers:
            columns = layers_in(history)
            here = [n for n, each in enumerate(layers) if each.layer in columns]
            there = [columns[layers[n].layer].start // self._width for n in here]
            known = (layers, np.array(here, np.intp), np.array(there, np.intp))
            self._known[history] = known
        return known[1:]


TREND_STATISTICS = schema.ATTENTION_STATISTICS
TRENDS = (
    ("drift", "drift from the start ‖W−W₀‖/‖W₀‖", ("q", "k", "v")),
    ("cos", "cosine between weights", ("qk", "qv", "kv")),
    ("distance", "distance ‖Wa−Wb‖/√(‖Wa‖²+‖Wb‖²)", ("qk", "qv", "kv")),
    ("norm", "norm ‖W‖", ("q", "k", "v")),
    ("grad_cos", "cosine between gradients", ("qk", "qv", "kv")),
)
"""Statistic, its name for people, and its parts."""
NOT_COMPARABLE = "n/a"

TREND_COLUMNS = (
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
        super().__init__(TREND_COLUMNS, id=id)
        self.snapshot = Snapshot()
        self.heading = 1
        self._newest = NewestValues(schema.ATTENTION)
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
        histories = self.snapshot.history.tables_named(schema.ATTENTION)
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
        return self._values.value(row, TREND_STATISTICS.index(statistic))

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
        step = self.snapshot.history.table(schema.STEP)  # the same window as the loss has
        last = (step.last_step or 0) if step is not None else 0
        steps = window(last, None, info.total_steps if info else None, self.slow_link)
        name, _, parts = TRENDS[self.trend]
        layers: list[Layer] = []
        names: list[Layer] = []
        items: list[Item] = []
        layer = min(self.shown_layer, max(0, len(info.attention) - 1)) if info else 0
        buckets = 2 * self.chart.plot_width(size.width)
        place = None
        if info and info.attention:
            shown = info.attention[layer].layer
            place = location_of(self.snapshot.history, schema.ATTENTION, shown)
        if place is not None and place.history.rows:
            history, columns = place
            wanted = [columns[TREND_STATISTICS.index(f"{name}_{part}")] for part in parts]
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


# ---- attention_table
# Layers × one statistic, with the trend of each part.


VALUE = 9
WIDEST_TREND, NARROWEST_TREND = 40, 6
_BY_KEY = {statistic.key: statistic for statistic in SHOWN_STATISTICS}
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
        self.statistic = SHOWN_STATISTICS[0]
        self.filter = ""
        self.sorted_by = "order"
        self._newest = [
            NewestValues(name)
            for name in (schema.ATTENTION, schema.ATTENTION_SPECTRUM, schema.ATTENTION_HEALTH)
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
        wanted: dict[SeriesReader, list[tuple[int, str, int]]] = {}
        for layer in visible:
            place = self.statistic.place(self.snapshot, info.attention[layer])
            for part in self.statistic.parts:
                if place is not None and self._comparable(int(layer), part):
                    column = place.columns[self.statistic.index(part)]
                    wanted.setdefault(place.history, []).append((int(layer), part, column))
        for history, cells in wanted.items():
            self._draw_trends(history, cells)

    def _draw_trends(self, history: SeriesReader, cells: Sequence[tuple[int, str, int]]) -> None:
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


# ---- attention_heads
# The heads of one attention layer.


HEAD_COLUMNS = (
    TableColumn("head", "head", 4),
    *(
        TableColumn(
            name,
            name.replace("norm_", "‖W‖ ").replace("_", " "),
            7,
            style=STYLES[name.rpartition("_")[2]],
        )
        for name in schema.HEAD_STATISTICS
    ),
)


class HeadsTable(VirtualTable):
    """The heads of one layer: norms, cosines and drifts of their parts of Wq, Wk, Wv."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(HEAD_COLUMNS, id=id)
        self.descending = False
        self._values: NDArray[np.float32] | None = None
        self._layer: AttentionInfo | None = None

    def show_layer(self, snapshot: Snapshot, layer: AttentionInfo, why: str) -> None:
        """Show the heads of `layer`; `why` where there are none."""
        self._layer, self._values = layer, None
        place = location_of(snapshot.history, schema.ATTENTION_HEADS, layer.layer)
        latest = place.history.latest() if place is not None else None
        if place is not None and latest is not None:
            self._values = latest[1][place.columns.start : place.columns.stop]
        count = len(schema.HEAD_STATISTICS)
        heads = len(self._values) // count if self._values is not None else 0
        self.empty = why
        if len(self.order) != heads:
            self.set_order(np.arange(heads))
        self.update_rows()

    def cells(self, row: int, columns: Sequence[TableColumn], widths: Sequence[int]) -> Row:
        """One head."""
        assert self._values is not None
        assert self._layer is not None
        palette, count = self.palette, len(schema.HEAD_STATISTICS)
        cells: Row = [Segment(str(row).rjust(widths[0]), palette.text)]
        values = self._values[row * count : (row + 1) * count]
        for column, width in zip(columns[1:], widths[1:], strict=True):
            value = float(values[schema.HEAD_STATISTICS.index(column.key)])
            signed = column.key.startswith("cos")
            text = formatting.signed(value, width) if signed else formatting.number(value, width)
            style = getattr(palette, column.style)
            if value != value and not self._layer.comparable(column.key.rpartition("_")[2]):
                text, style = NOT_COMPARABLE.rjust(width), palette.faint
            elif not np.isfinite(value):
                style = palette.error
            cells.append(Segment(text, style))
        return cells

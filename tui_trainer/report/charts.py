"""The charts of a report, as inline SVG.

A curve is a band from the lowest to the highest value in each column of pixels, so that no spike is
lost. Colours are CSS classes, so that one picture serves a light and a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from html import escape

import numpy as np
from numpy.typing import NDArray

from tui_trainer.history.columns import LayerLocation, location_of, logged_series
from tui_trainer.history.window import Window
from tui_trainer.protocol import PHASES, schema
from tui_trainer.report.read import ReportData

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 62, 22, 10, 26
BUCKETS = 560
LOG_FROM = 1000.0
"""An axis is logarithmic if the largest value is more than this many times the median."""
MAX_LOGGED = 24
"""Maximum number of charts of values of `tui_trainer.log`."""


@dataclass(frozen=True)
class SvgSeries:
    """One curve over buckets of steps."""

    style: str
    """CSS class of the curve's colour."""
    label: str
    steps: NDArray[np.float64]
    """The middle of each bucket, shape (n,)."""
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    last: float
    bad: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Steps at which a value was not finite."""
    points: bool = False
    """Whether to draw single points joined by a thin line."""

    @staticmethod
    def of(style: str, label: str, window: Window, column: int, points: bool = False) -> SvgSeries:
        """One column of a window."""
        kept = np.flatnonzero(window.filled)
        middle = (window.edges[kept] + window.edges[kept + 1] - 1) / 2
        return SvgSeries(
            style,
            label,
            middle.astype(np.float64),
            window.low[kept, column].astype(np.float64),
            window.high[kept, column].astype(np.float64),
            float(window.last[kept[-1], column]) if len(kept) else math.nan,
            middle[window.nonfinite[kept, column]].astype(np.float64),
            points,
        )


@dataclass(frozen=True)
class SvgChart:
    """Curves over one range of steps, and how to draw them."""

    series: Sequence[SvgSeries]
    stop: int
    """The last step."""
    height: int = 220
    unit: str = ""
    log: bool = False
    zero: bool = False
    """Whether the axis includes 0."""
    rule: float | None = None
    """A dashed horizontal line, such as the clipping threshold."""
    marks: Sequence[int] = ()
    """Steps to mark on the axis."""
    start: int = 1


def draw(chart: SvgChart, title: str) -> str:
    """The chart as an <svg> element. Its axis becomes logarithmic where the largest value would
    flatten all others."""
    if not chart.log and _spans_thousands(chart):
        chart = replace(chart, log=True, zero=False)
    low, high = _range(chart)
    axes = _Axes(chart, low, high)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {chart.height}" role="img" '
        f'aria-label="{escape(title, quote=True)}">',
        f"<title>{escape(title)}</title>",
    ]
    parts += _draw_axes(chart, axes)
    if chart.rule is not None and low <= chart.rule <= high:
        y = axes.y(np.array([chart.rule]))[0]
        parts.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
    for series in chart.series:
        parts += _points(series, axes) if series.points else _band(series, axes)
    parts += _marks(chart, axes)
    return "".join([*parts, "</svg>"])


class _Axes:
    """Maps steps and values to coordinates."""

    def __init__(self, chart: SvgChart, low: float, high: float) -> None:
        self._chart, self.low, self.high = chart, low, high
        self._span = max(1, chart.stop - chart.start)

    def x(self, steps: NDArray[np.float64]) -> NDArray[np.float64]:
        return LEFT + (steps - self._chart.start) / self._span * (WIDTH - LEFT - RIGHT)

    def y(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        low, high = self.low, self.high
        if self._chart.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.where(values > 0, np.log10(values), math.log10(low))
            low, high = math.log10(low), math.log10(high)
        share = (values - low) / ((high - low) or 1.0)
        return TOP + (1 - share) * (self._chart.height - TOP - BOTTOM)


def _spans_thousands(chart: SvgChart) -> bool:
    """Whether all values are above zero, and the largest is over LOG_FROM times the median."""
    every = [values for series in chart.series for values in (series.low, series.high)]
    joined = np.concatenate(every) if every else np.zeros(0)
    joined = joined[np.isfinite(joined)]
    if not len(joined) or joined.min() <= 0:
        return False
    return float(joined.max()) > LOG_FROM * float(np.median(joined))


def _range(chart: SvgChart) -> tuple[float, float]:
    every = [values for series in chart.series for values in (series.low, series.high)]
    if chart.rule is not None:
        every.append(np.array([chart.rule]))
    joined = np.concatenate(every) if every else np.zeros(0)
    joined = joined[np.isfinite(joined) & ((joined > 0) | (not chart.log))]
    if not len(joined):
        return (0.1, 1.0) if chart.log else (0.0, 1.0)
    low, high = float(joined.min()), float(joined.max())
    if chart.log:
        return 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) + 1e-9)
    low = min(low, 0.0) if chart.zero else low
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low if chart.zero and low == 0 else low - margin, high + margin


def _band(series: SvgSeries, axes: _Axes) -> list[str]:
    """The range of values in each bucket as an area, at least as thick as a line."""
    known = np.isfinite(series.low) & np.isfinite(series.high)
    parts = []
    for part in _runs(known):
        x = axes.x(series.steps[part])
        top, bottom = axes.y(series.high[part]), axes.y(series.low[part])
        there = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, top, strict=True))
        back = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x[::-1], bottom[::-1], strict=True))
        parts.append(f'<polygon class="{series.style}" points="{there} {back}"/>')
    return parts


def _runs(known: NDArray[np.bool_]) -> list[slice]:
    """Slices of consecutive known values."""
    edges = np.flatnonzero(np.diff(np.r_[False, known, False].astype(np.int8)))
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _points(series: SvgSeries, axes: _Axes) -> list[str]:
    known = np.isfinite(series.high)
    x, y = axes.x(series.steps[known]), axes.y(series.high[known])
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    parts = [f'<polyline class="{series.style} thin" points="{line}"/>']
    if len(x) <= 80:
        parts += [
            f'<circle class="{series.style}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>'
            for a, b in zip(x, y, strict=True)
        ]
    return parts


def _marks(chart: SvgChart, axes: _Axes) -> list[str]:
    base = chart.height - BOTTOM
    columns = np.unique(np.round(axes.x(np.asarray(chart.marks, np.float64)), 0))
    ticks = "".join(f"M{x:.0f} {base}v-7" for x in columns)
    parts = [f'<path class="mark" d="{ticks}"/>'] if ticks else []
    bad = [steps for series in chart.series for steps in series.bad.tolist()]
    crosses = np.unique(np.round(axes.x(np.asarray(bad, np.float64)), 0))
    return parts + [
        f'<path class="bad" d="M{x - 4:.0f} {base - 4}l8 8m0 -8l-8 8"/>' for x in crosses
    ]


def _draw_axes(chart: SvgChart, axes: _Axes) -> list[str]:
    base = chart.height - BOTTOM
    parts = []
    for value in ticks(axes.low, axes.high, chart.log):
        y = axes.y(np.array([value]))[0]
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        text = f"{value:g}{chart.unit}"
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for step in ticks(chart.start, chart.stop, False, 8):
        if step == int(step):
            x = axes.x(np.array([step]))[0]
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{chart.height - 8}" text-anchor="middle">'
                f"{int(step):,}</text>"
            )
    parts.append(f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
    return parts


def ticks(low: float, high: float, log: bool, count: int = 5) -> list[float]:
    """Round values between `low` and `high`."""
    if log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        every = max(1, (last - first) // count + 1)
        return [10.0**power for power in range(first, last + 1, every)]
    wanted = (high - low) / count
    if wanted <= 0 or not math.isfinite(wanted):
        return [low]
    power = 10.0 ** math.floor(math.log10(wanted))
    spacing = next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= wanted * (1 - 1e-9))
    first, last = math.ceil(low / spacing - 1e-9), math.floor(high / spacing + 1e-9)
    return [round(n * spacing, 12) for n in range(first, last + 1)]


# ---------------------------------------------------------------- panels

PHASE_COLOURS = tuple(f"p{number}" for number in range(len(PHASES)))
COLOURS = ("loss", "validation", "norm", "clip", "q", "k", "v", "accent", *PHASE_COLOURS)
LAYERS_SHOWN = 24
PAIRS = (("cos_qk", "v", "qk"), ("cos_qv", "k", "qv"), ("cos_kv", "q", "kv"))
"""A pair has the colour of the third projection, as on the screen."""
DRIFTS = (("drift_q", "q", "q"), ("drift_k", "k", "k"), ("drift_v", "v", "v"))


@dataclass(frozen=True)
class Key:
    """A curve's entry in the legend, with its last value."""

    style: str
    label: str
    value: float


@dataclass(frozen=True)
class ChartPanel:
    """A chart with its title and legend."""

    title: str
    keys: tuple[Key, ...]
    svg: str


def panels(data: ReportData) -> Iterator[ChartPanel]:
    """Every chart for which this run has measurements."""
    for make in (_loss, _norm, _rate, _phases):
        if (made := make(data)) is not None:
            yield made
    yield from _logged(data)
    yield from _attention(data)


def _panel(title: str, chart: SvgChart) -> ChartPanel:
    keys = tuple(Key(each.style, each.label, each.last) for each in chart.series)
    return ChartPanel(title, keys, draw(chart, title))


def _loss(data: ReportData) -> ChartPanel | None:
    found = data.history.find(schema.STEP, "loss")
    if found is None:
        return None
    table, column = found
    series = [SvgSeries.of("loss", "training", data.window(table, [column], BUCKETS), 0)]
    validation = data.history.find(schema.VALIDATION, "loss")
    if validation is not None:
        seen = data.window(validation[0], [validation[1]], BUCKETS)
        series.append(SvgSeries.of("validation", "validation", seen, 0, points=True))
    chart = SvgChart(series, data.last_step, height=260, start=data.first_step)
    return _panel("Loss", chart)


def _logged(data: ReportData) -> Iterator[ChartPanel]:
    """Charts of the values of `tui_trainer.log`."""
    for each in logged_series(data.history)[:MAX_LOGGED]:
        seen = data.window(each.series, [each.column], BUCKETS)
        curve = SvgSeries.of("accent", "", seen, 0)
        if np.isfinite(curve.high).any():
            yield _panel(each.name, SvgChart([curve], data.last_step, 180, start=data.first_step))


def _norm(data: ReportData) -> ChartPanel | None:
    found = data.history.find(schema.STEP, "grad_norm_preclip")
    if found is None:
        return None
    table, column = found
    clip = data.history.find(schema.CLIP, "max_norm")
    chart = SvgChart(
        [SvgSeries.of("norm", "before clipping", data.window(table, [column], BUCKETS), 0)],
        data.last_step,
        height=260,
        zero=True,
        rule=clip[0].newest("max_norm") if clip else None,
        marks=data.steps_of("clip"),
        start=data.first_step,
    )
    count = len(chart.marks)
    title = "Gradient norm" + (f", limit {chart.rule:g}" if chart.rule is not None else "")
    return _panel(title + (f", {count:,} clips" if count else ""), chart)


def _rate(data: ReportData) -> ChartPanel | None:
    found = data.history.find(schema.STEP, "learning_rate")
    if found is None:
        return None
    seen = data.window(found[0], [found[1]], BUCKETS)
    series = [SvgSeries.of("accent", "", seen, 0)]
    if not np.isfinite(series[0].high).any():
        return None
    chart = SvgChart(series, data.last_step, 180, zero=True, start=data.first_step)
    return _panel("Learning rate", chart)


def _phases(data: ReportData) -> ChartPanel | None:
    table = data.history.table(schema.PHASE_MS)
    if table is None or not table.rows:
        return None
    columns = list(range(table.columns))
    seen = data.window(table, columns, BUCKETS // 4)
    series = [
        SvgSeries.of(PHASE_COLOURS[place % len(PHASE_COLOURS)], each.name, seen, place)
        for place, each in enumerate(table.table.columns)
    ]
    series = [each for each in series if np.isfinite(each.high).any() and (each.high > 0).any()]
    if not series:
        return None
    chart = SvgChart(series, data.last_step, 180, " ms", log=True, start=data.first_step)
    return _panel("Time of each phase", chart)


def _attention(data: ReportData) -> Iterator[ChartPanel]:
    for layer in data.info.attention[:LAYERS_SHOWN]:
        place = location_of(data.history, schema.ATTENTION, layer.layer)
        if place is None or not place.history.rows:
            continue
        for title, parts in (("cosines", PAIRS), ("drift from initialisation", DRIFTS)):
            meant = [each for each in parts if layer.comparable(each[2])]
            chart = _layer(data, place, meant)
            if chart is not None:
                yield _panel(f"{layer.layer}: {title}", chart)


def _layer(
    data: ReportData, place: LayerLocation, parts: Sequence[tuple[str, str, str]]
) -> SvgChart | None:
    if not parts:
        return None
    wanted = [place.columns[schema.ATTENTION_STATISTICS.index(name)] for name, _, _ in parts]
    seen = data.window(place.history, wanted, BUCKETS // 2)
    series = [SvgSeries.of(style, label, seen, n) for n, (_, style, label) in enumerate(parts)]
    if not any(np.isfinite(each.high).any() for each in series):
        return None
    return SvgChart(series, data.last_step, 170, start=data.first_step)

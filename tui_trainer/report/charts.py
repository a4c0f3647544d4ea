"""The charts of a report, each with its title and key."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from tui_trainer.history.layers import Place, place_of
from tui_trainer.protocol import PHASES, tables
from tui_trainer.report.read import Recorded
from tui_trainer.report.svg import BUCKETS, Chart, Series, draw

PHASE_COLOURS = tuple(f"p{number}" for number in range(len(PHASES)))
COLOURS = ("loss", "validation", "norm", "clip", "q", "k", "v", "accent", *PHASE_COLOURS)
LAYERS_SHOWN = 24
PAIRS = (("cos_qk", "v", "qk"), ("cos_qv", "k", "qv"), ("cos_kv", "q", "kv"))
"""A pair has the colour of the one that it lacks, as on the screen."""
DRIFTS = (("drift_q", "q", "q"), ("drift_k", "k", "k"), ("drift_v", "v", "v"))


def panels(recorded: Recorded) -> Iterator[str]:
    """Every chart that this run has measurements for."""
    for panel in (_loss, _norm, _rate, _phases):
        if (made := panel(recorded)) is not None:
            yield made
    yield from _attention(recorded)


def panel(title: str, chart: Chart) -> str:
    """A chart in its frame: title, key with the newest values, picture."""
    keys = "".join(
        f'<span class="key"><i class="{each.style}"></i>{escape(each.label)} '
        f"{_value(each.last)}</span>"
        for each in chart.series
    )
    return f'<div class="panel"><h3>{escape(title)}{keys}</h3>{draw(chart, title)}</div>\n'


def _value(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else escape(str(value))


def _loss(recorded: Recorded) -> str | None:
    found = recorded.found(tables.STEP, "loss")
    if found is None:
        return None
    table, column = found
    series = [Series.of("loss", "training", recorded.window(table, [column], BUCKETS), 0)]
    validation = recorded.found(tables.VALIDATION, "loss")
    if validation is not None:
        seen = recorded.window(validation[0], [validation[1]], BUCKETS)
        series.append(Series.of("validation", "validation", seen, 0, points=True))
    chart = Chart(series, recorded.last_step, height=260, start=recorded.first_step)
    return panel("Loss", chart)


def _norm(recorded: Recorded) -> str | None:
    found = recorded.found(tables.STEP, "grad_norm_preclip")
    if found is None:
        return None
    table, column = found
    clip = recorded.found(tables.CLIP, "max_norm")
    latest = clip[0].latest() if clip else None
    chart = Chart(
        [Series.of("norm", "before clipping", recorded.window(table, [column], BUCKETS), 0)],
        recorded.last_step,
        height=260,
        zero=True,
        rule=float(latest[1][clip[1]]) if clip and latest else None,
        marks=recorded.steps_of("clip"),
        start=recorded.first_step,
    )
    count = len(chart.marks)
    title = "Gradient norm" + (f", limit {chart.rule:g}" if chart.rule is not None else "")
    return panel(title + (f", {count:,} clips" if count else ""), chart)


def _rate(recorded: Recorded) -> str | None:
    found = recorded.found(tables.STEP, "learning_rate")
    if found is None:
        return None
    seen = recorded.window(found[0], [found[1]], BUCKETS)
    series = [Series.of("accent", "", seen, 0)]
    if not np.isfinite(series[0].high).any():
        return None
    chart = Chart(series, recorded.last_step, 180, zero=True, start=recorded.first_step)
    return panel("Learning rate", chart)


def _phases(recorded: Recorded) -> str | None:
    table = recorded.history.table(tables.PHASE_MS)
    if table is None or not table.rows:
        return None
    columns = list(range(table.columns))
    seen = recorded.window(table, columns, BUCKETS // 4)
    series = [
        Series.of(PHASE_COLOURS[place % len(PHASE_COLOURS)], each.name, seen, place)
        for place, each in enumerate(table.table.columns)
    ]
    series = [each for each in series if np.isfinite(each.high).any() and (each.high > 0).any()]
    if not series:
        return None
    chart = Chart(series, recorded.last_step, 180, " ms", log=True, start=recorded.first_step)
    return panel("Time of each phase", chart)


def _attention(recorded: Recorded) -> Iterator[str]:
    for layer in recorded.info.attention[:LAYERS_SHOWN]:
        place = place_of(recorded.history, tables.ATTENTION, layer.layer)
        if place is None or not place.history.rows:
            continue
        for title, parts in (("cosines", PAIRS), ("drift from the start", DRIFTS)):
            meant = [each for each in parts if layer.comparable(each[2])]
            chart = _layer(recorded, place, meant)
            if chart is not None:
                yield panel(f"{layer.layer}: {title}", chart)


def _layer(recorded: Recorded, place: Place, parts: Sequence[tuple[str, str, str]]) -> Chart | None:
    if not parts:
        return None
    wanted = [place.columns[tables.ATTENTION_STATISTICS.index(name)] for name, _, _ in parts]
    seen = recorded.window(place.history, wanted, BUCKETS // 2)
    series = [Series.of(style, label, seen, n) for n, (_, style, label) in enumerate(parts)]
    if not any(np.isfinite(each.high).any() for each in series):
        return None
    return Chart(series, recorded.last_step, 170, start=recorded.first_step)

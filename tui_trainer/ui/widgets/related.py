"""Curves of the related runs in the charts of a run: dim, with a marker for each run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from rich.style import Style

from tui_trainer.client.api import RelatedRun
from tui_trainer.protocol import formatting
from tui_trainer.protocol.text import strip_escapes, truncate_middle
from tui_trainer.ui.widgets.axes import AXIS_WIDTH
from tui_trainer.ui.widgets.chart_layers import Layer, Line, Points, fill_gaps, smooth
from tui_trainer.ui.widgets.lines import LineView, Row

MARKERS, ASCII_MARKERS = "■□▲△", "%&=@"
"""Markers other than those of validation points and events, which are in the same charts."""
MARKER_SPACING = 26
"""Dot columns between two markers of a line."""
MAX_NAME_WIDTH = 28


Figure = tuple[str, str, Style]
"""(marker and name of a run, its newest value, style of both)"""


def related_curves(
    view: LineView,
    runs: Sequence[RelatedRun],
    table: str,
    column: str,
    steps: tuple[int, int],
    columns: int,
    points: bool = False,
) -> tuple[list[Layer], list[Figure]]:
    """Layers to draw below a chart's own curves: a smoothed line, or single `points`, of each
    related run that has this column. And figures for the legend: marker, name and newest value."""
    layers: list[Layer] = []
    figures: list[Figure] = []
    style = view.palette.dim
    for place, run in enumerate(runs):
        window = run.window(table, column, steps, columns)
        if window is None or not window.filled.any():
            continue
        marker = (ASCII_MARKERS if view.glyphs.ascii else MARKERS)[place % len(MARKERS)]
        if points:
            at = np.flatnonzero(window.filled)
            layers.append(Points(style, at, window.last[at, 0], marker))
            continue
        low, high = fill_gaps(window.low[:, 0], window.high[:, 0], window.filled)
        line = smooth(low, high)
        at = _marker_columns(line, place)
        layers += [Line(style, line), Points(style, at, line[at], marker)]
        newest = run.newest(table, column)
        figures.append((f"{marker} {run.name}", formatting.number(newest, 0), style))
    return layers, figures


def related_legend(view: LineView, figures: Sequence[Figure], width: int) -> list[Row]:
    """`■ gpt-2 1.43  □ gpt-3 1.51`, as one row; none without related runs."""
    if not figures:
        return []
    row: Row = [Segment(" " * AXIS_WIDTH, view.palette.text)]
    left = width - AXIS_WIDTH
    for label, value, style in figures:
        name = truncate_middle(strip_escapes(label), MAX_NAME_WIDTH, view.glyphs.ellipsis)
        text = f"{name} {value}  "
        row.append(Segment(text[: max(0, left)], style))
        left -= len(text)
    return [row]


def _marker_columns(line: NDArray[np.float32], place: int) -> NDArray[np.int64]:
    """The dot columns of a line's markers: at its end, and at other places than other lines'."""
    known = np.flatnonzero(np.isfinite(line))
    at = known[(known - place * MARKER_SPACING // 4) % MARKER_SPACING == 0]
    return np.asarray(np.unique(np.r_[at, known[-1:]]), np.int64)

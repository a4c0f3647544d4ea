"""The two axes of a chart: the range that its layers need, its labels, and the step axis.

A linear axis leaves out a few values that would flatten all others; it becomes logarithmic by
itself where values span thousands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from rich.style import Style

from tui_trainer.protocol import formatting
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.theme import Palette
from tui_trainer.ui.widgets.chart_layers import AxisMarks, Band, Layer, Line, Points, Threshold
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.scale import Scale, fit_scale

AXIS_WIDTH = 9
"""Cells left of the plot: a label of 8, right-aligned, and the axis itself."""
OUTLIER_QUANTILES = (0.02, 0.98)
OUTLIER_DISTANCE = 4.0
"""A linear axis leaves out values that are further outside the quantiles than this many times their
distance."""
MIN_VALUES_FOR_OUTLIERS = 60
LOG_BY_ITSELF = 1000.0
"""Times the median, from which a largest value that is not left out makes an axis logarithmic."""
NEWEST_COLUMNS = 2
"""Dot columns at the end of the curves whose values are always shown."""


@dataclass(frozen=True)
class Outliers:
    """Values beyond the end of a linear axis, which would flatten all others."""

    above: bool
    edge: float
    extreme: float
    column: int
    """Dot column of the extreme."""
    columns: NDArray[np.int64]
    """Dot columns of all of them."""


def fit_layers(
    layers: Sequence[Layer], log: bool | None, include_zero: bool, previous: Scale | None
) -> tuple[Scale, list[Outliers]]:
    """A scale for the values of some layers; on a linear axis without a few that would flatten all
    others, which are returned. `log` None: linear, or logarithmic where that would show
    nothing of most values."""
    by_itself, log = log is None, bool(log)
    columns: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    values: list[NDArray[np.floating]] = [np.empty(0)]
    limits: list[float] = []
    for layer in layers:
        if isinstance(layer, Band):
            values += [layer.low, layer.high]
            columns += [np.arange(len(layer.low)), np.arange(len(layer.high))]
        elif isinstance(layer, Line):
            values.append(layer.values)
            columns.append(np.arange(len(layer.values)))
        elif isinstance(layer, Points):
            values.append(layer.values)
            columns.append(layer.columns)
        elif isinstance(layer, Threshold):
            limits.append(layer.value)
    numbers, places = np.concatenate(values).astype(np.float64), np.concatenate(columns)
    shown = np.isfinite(numbers) & ((numbers > 0) | (not log))
    numbers, places = numbers[shown], places[shown]
    limits = [limit for limit in limits if np.isfinite(limit) and (limit > 0 or not log)]
    if not len(numbers) and not limits:
        return fit_scale(np.nan, np.nan, log, include_zero, previous), []
    hidden = [] if log else _outliers(numbers, places)
    kept = _without(numbers, hidden)
    if by_itself and _spans_thousands(kept, limits, previous):
        log, hidden = True, []
    elif len(kept):  # next to outliers that are shown, those on the other side may be small
        far = OUTLIER_DISTANCE * float(kept.max() - kept.min())
        hidden = [each for each in hidden if abs(each.extreme - each.edge) > far]
        numbers = _without(numbers, hidden)
    ends = [*limits, *((float(numbers.min()), float(numbers.max())) if len(numbers) else ())]
    scale = fit_scale(min(ends), max(ends), log, include_zero, previous)
    # A scale that was kept may show what a new one would hide.
    return scale, [each for each in hidden if not scale.low <= each.extreme <= scale.high]


def _spans_thousands(
    numbers: NDArray[np.float64], limits: Sequence[float], previous: Scale | None
) -> bool:
    """Whether a linear axis would show nothing of most values, as of a loss that explodes: then it
    is logarithmic by itself."""
    if len(numbers) < MIN_VALUES_FOR_OUTLIERS or min([*limits, float(numbers.min())]) <= 0:
        return False
    kept = previous is not None and previous.log
    factor = LOG_BY_ITSELF / 3 if kept else LOG_BY_ITSELF
    return float(numbers.max()) > factor * float(np.median(numbers))


def _without(numbers: NDArray[np.float64], hidden: Sequence[Outliers]) -> NDArray[np.float64]:
    for each in hidden:
        numbers = numbers[numbers <= each.edge if each.above else numbers >= each.edge]
    return numbers


def _outliers(numbers: NDArray[np.float64], places: NDArray[np.int64]) -> list[Outliers]:
    """The few values that are so far from all others that they would flatten them: none where the
    newest values are among them, since then the run is on its way there."""
    if len(numbers) < MIN_VALUES_FOR_OUTLIERS:
        return []
    low, high = np.quantile(numbers, OUTLIER_QUANTILES)
    newest = places >= places.max() - NEWEST_COLUMNS
    found = []
    for above, edge in ((True, high), (False, low)):
        beyond = numbers > edge if above else numbers < edge
        far = float(numbers.max() - high if above else low - numbers.min())
        if far <= OUTLIER_DISTANCE * (high - low) or (beyond & newest).any():
            continue
        extreme = int(numbers.argmax() if above else numbers.argmin())
        found.append(
            Outliers(above, float(edge), float(numbers[extreme]), int(places[extreme]),
                     np.unique(places[beyond]))
        )  # fmt: skip
    return found


def value_labels(scale: Scale, rows: int) -> dict[int, str]:
    """Cell row to its label: round values, evenly spaced."""
    ticks = scale.ticks(rows)
    placed = zip(ticks, _tick_texts(ticks, scale.log), strict=True)
    labels = {scale.cell_row(tick, rows): text for tick, text in placed}
    return {row: text for row, text in labels.items() if row is not None}


def _tick_texts(ticks: Sequence[float], log: bool) -> list[str]:
    """The ticks with as many decimals as are needed to tell them apart."""
    room = AXIS_WIDTH - 1
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if log:  # `0.1`, `1`, `1e-30`
        return [f"{tick:.3g}".replace("e+", "e").replace("e-0", "e-") for tick in ticks]
    if len(ticks) < 2 or not 1e-5 < largest < 1e6:
        return [formatting.number(tick, room, 3).strip() if tick else "0" for tick in ticks]
    for decimals in range(7):
        texts = [f"{tick:.{decimals}f}" for tick in ticks]
        exact = all(
            abs(float(text) - tick) < 1e-3 * largest
            for text, tick in zip(texts, ticks, strict=True)
        )
        if exact and len(set(texts)) == len(texts):
            break
    return [
        text if len(text) <= room else formatting.number(float(text), room, 3) for text in texts
    ]


def step_axis(
    width: int, steps: tuple[int, int], layers: Sequence[Layer], palette: Palette, glyphs: Glyphs
) -> Row:
    """The step axis: a rule with step numbers in it and the marks of the layers.

    Where marks and numbers meet, a NaN's mark displaces the number and any other mark only colours
    the digit under it.
    """
    cells = [(glyphs.axis, palette.faint)] * width
    for layer in layers:
        if isinstance(layer, Band | Line) and layer.nonfinite is not None:
            for x in np.unique(np.flatnonzero(layer.nonfinite) // 2):
                cells[x] = (glyphs.failed, palette.error)
    _write_step_numbers(cells, steps, palette)
    for layer in layers:
        if isinstance(layer, AxisMarks):
            for x in np.unique(layer.columns // 2):
                if 0 <= x < width and cells[x][1] is not palette.error:
                    is_digit = cells[x][1] is palette.dim
                    cells[x] = (cells[x][0] if is_digit else layer.marker, layer.style)
    label = Segment("step ".rjust(AXIS_WIDTH - 1), palette.dim)
    return [label, Segment(glyphs.corner, palette.faint), *_joined(cells)]


def _joined(cells: Sequence[tuple[str, Style]]) -> Row:
    """Cells as segments, neighbours of one style in one segment."""
    row: Row = []
    text, style = "", cells[0][1]
    for character, next_style in cells:
        if next_style is not style:
            row.append(Segment(text, style))
            text, style = "", next_style
        text += character
    return [*row, Segment(text, style)]


def _write_step_numbers(
    cells: list[tuple[str, Style]], steps: tuple[int, int], palette: Palette
) -> None:
    (start, stop), width = steps, len(cells)
    for tick in _step_ticks(start, stop, max(1, width // 10)):
        text = f"{tick:,}"
        x = int((tick - start) * width / max(1, stop - start)) - len(text) // 2
        x = min(max(x, 0), width - len(text))
        around = cells[max(0, x - 1) : x + len(text) + 1]
        if x >= 0 and all(style is palette.faint for _, style in around):
            cells[x : x + len(text)] = [(character, palette.dim) for character in text]


def _step_ticks(start: int, stop: int, max_count: int) -> list[int]:
    spacing = max(1, -(-(stop - start) // max(1, max_count)))
    power = 10 ** (len(str(spacing)) - 1)
    spacing = next(n * power for n in (1, 2, 5, 10) if n * power >= spacing)
    first = -(-start // spacing) * spacing
    return list(range(first, stop + 1, spacing))

"""Charts as text, drawn by plotext: the pictures of `show` and `compare --plain`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

X_TICKS = 6
MIN_WIDTH = 30
LOG_FROM = 50.0
"""The axis is logarithmic if the largest value is more than this many times the median of the
lowest curve, which would be a straight line at the bottom of a linear axis."""


@dataclass(frozen=True)
class TextCurve:
    """One curve over buckets of steps; None where a bucket has no finite value."""

    steps: Sequence[int]
    low: Sequence[float | None]
    high: Sequence[float | None]
    marker: str = "braille"
    """`braille`, or the character to draw with."""


def text_chart(curves: Sequence[TextCurve], width: int, height: int) -> list[str]:
    """The lines of a chart of `width` × `height` cells with axes; none without a finite value.

    A curve passes through the lowest and the highest value of every bucket, so that no spike is
    lost, and is interrupted where a bucket has no finite value. The axis is logarithmic, with `log`
    at its top, where the largest value would flatten a curve.
    """
    points = [_points(curve) for curve in curves]
    finite = [y for _, ys, _ in points for y in ys]
    if not finite or width < MIN_WIDTH:
        return []
    lowest = min(statistics.median(ys) for _, ys, _ in points if ys)
    log = min(finite) > 0 and max(finite) > LOG_FROM * lowest
    if log:
        points = [(xs, [math.log10(y) for y in ys], gaps) for xs, ys, gaps in points]
        finite = [math.log10(y) for y in finite]
    import plotext

    # Without this plotext limits a figure to the size of the terminal, which a pipe does not have.
    plotext.terminal.limit(False, False)
    figure = plotext.figure
    figure.clear.all()
    figure.plot_size(width, height)
    figure.canvas("default")
    first = min(curve.steps[0] for curve in curves if len(curve.steps))
    last = max(curve.steps[-1] for curve in curves if len(curve.steps))
    steps = _ticks(first, last)
    figure.ruler("x").ticks(steps, [f"{step:,}" for step in steps])
    bottom, top = min(finite), max(finite)
    levels = [bottom, (bottom + top) / 2, top] if top > bottom else [bottom]
    labels = [f"{10**level if log else level:.4g}" for level in levels]
    if log:
        labels[-1] = f"log {labels[-1]}"
    figure.ruler("y").ticks(levels, labels)
    for curve, (xs, ys, gaps) in zip(curves, points, strict=True):
        if not ys:
            continue
        signal = figure.signal(xs, ys, marker=curve.marker).lines(True)
        for gap in gaps:
            signal.line(gap, False)
        figure.draw(signal)
    return [line.rstrip() for line in figure.build().string(colorless=True).splitlines() if line]


def _points(curve: TextCurve) -> tuple[list[int], list[float], list[int]]:
    """Steps and values of the points, and the indices of points that start after a gap."""
    xs: list[int] = []
    ys: list[float] = []
    gaps: list[int] = []
    interrupted = False
    for step, low, high in zip(curve.steps, curve.low, curve.high, strict=True):
        if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
            interrupted = bool(xs)
            continue
        if interrupted:
            gaps.append(len(xs))
            interrupted = False
        # The end that is nearer to the previous point comes first, so that the line does not go
        # back.
        ends = [low] if low == high else [low, high]
        if ys and abs(ends[-1] - ys[-1]) < abs(ends[0] - ys[-1]):
            ends.reverse()
        xs += [step] * len(ends)
        ys += ends
    return xs, ys, gaps


def _ticks(first: int, last: int) -> list[int]:
    span = max(1, last - first)
    return sorted({first + round(span * index / (X_TICKS - 1)) for index in range(X_TICKS)})

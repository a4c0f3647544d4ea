"""The layers of a chart: bands, lines, points and marks, in dot columns, two to a cell.

A band reaches exactly from the smallest to the largest value of each column of dots, so that no
spike is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.style import Style

from tui_trainer.history.window import Window

Floats = NDArray[np.float32]

SMOOTHING_SHARE = 1 / 24
"""A smoothed line averages over about this share of the chart's width."""


@dataclass(frozen=True)
class Band:
    """The smallest to the largest value of each dot column, two to a cell; nan leaves a gap."""

    style: Style
    low: Floats
    high: Floats
    nonfinite: NDArray[np.bool_] | None = None
    """Dot columns in which a nan or an infinity was measured; they are marked on the step axis."""

    @staticmethod
    def from_window(window: Window, column: int, style: Style) -> Band:
        """A band from a column of a history window with two buckets to a cell."""
        low, high = fill_gaps(window.low[:, column], window.high[:, column], window.filled)
        return Band(style, low, high, window.nonfinite[:, column])


@dataclass(frozen=True)
class Line:
    """A line through one value per dot column; nan interrupts it."""

    style: Style
    values: Floats
    nonfinite: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Points:
    """Single values, each drawn as a marker in its cell."""

    style: Style
    columns: NDArray[np.int64]
    """Dot columns."""
    values: Floats
    marker: str


@dataclass(frozen=True)
class Label:
    """The name of a curve at its end, which tells curves apart even without colour."""

    style: Style
    column: int
    """Dot column of the curve's end; the name is right of it."""
    value: float
    text: str


@dataclass(frozen=True)
class Threshold:
    """A dashed horizontal line, such as the limit of gradient clipping."""

    style: Style
    value: float


@dataclass(frozen=True)
class AxisMarks:
    """Dot columns that are marked on the step axis, such as those of clipped steps."""

    style: Style
    columns: NDArray[np.int64]
    marker: str

    @staticmethod
    def at_steps(
        marked: Sequence[int], steps: tuple[int, int], columns: int, style: Style, marker: str
    ) -> AxisMarks:
        """Marks at some of the steps of a chart of start <= step < stop, `columns` dots wide."""
        start, stop = steps
        found = np.array([step for step in marked if start <= step < stop], np.int64)
        return AxisMarks(style, (found - start) * columns // max(1, stop - start), marker)


@dataclass(frozen=True)
class ChartMarker:
    """A dashed vertical line at a step, such as the onset of a finding."""

    style: Style
    step: int


Layer = Band | Line | Points | Label | Threshold | AxisMarks | ChartMarker


def fill_gaps(low: Floats, high: Floats, filled: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Interpolate dot columns without a measurement between two that have one (where there are
    fewer steps than dots). A measured nan stays a gap."""
    at = np.flatnonzero(filled)
    if len(at) < 2 or len(at) == at[-1] - at[0] + 1:
        return low, high
    inner = np.arange(at[0], at[-1] + 1)
    low, high = low.copy(), high.copy()
    for values in (low, high):
        values[inner] = np.interp(inner, at, values[at]).astype(np.float32)
    return low, high


def smooth(low: Floats, high: Floats, geometric: bool = False) -> Floats:
    """The middle of each dot column's extent, averaged with a Gaussian over SMOOTHING_SHARE of the
    width; nan where nothing was measured. `geometric`: averages of logarithms, for positive values,
    so that a value of another magnitude does not lift its neighbours."""
    if geometric:
        with np.errstate(divide="ignore"):
            return np.exp(smooth(np.log(low), np.log(high)))
    middle = low / 2 + high / 2
    known = np.isfinite(middle)
    if not known.any():
        return np.full(len(low), np.nan, np.float32)
    width = max(2.0, len(low) * SMOOTHING_SHARE)
    reach = int(2 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / (width / 2)) ** 2)
    largest = float(np.abs(middle[known]).max()) or 1.0
    scaled = np.where(known, middle / largest, 0.0)
    total = np.convolve(scaled, kernel)[reach : reach + len(middle)]
    weight = np.convolve(known.astype(float), kernel)[reach : reach + len(middle)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(known, total / weight * largest, np.nan), np.float32)

"""What a chart can show: bands that lose no spike, lines, points, names, thresholds and marks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.style import Style

from tui_trainer.history.window import Window

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Band:
    """The smallest to the largest value of each dot column (two to a cell); NaN: there is none."""

    style: Style
    low: Floats
    high: Floats
    bad: NDArray[np.bool_] | None = None
    """Dot columns in which a NaN or an infinity was measured: marked on the axis."""

    @staticmethod
    def of(window: Window, column: int, style: Style) -> Band:
        """A band from a column of a history window of two buckets a cell."""
        low, high = window.low[:, column], window.high[:, column]
        bad = window.nonfinite[:, column]
        return Band(style, *bridge(low, high, window.filled), bad)


@dataclass(frozen=True)
class Line:
    """A line through one value a dot column, NaN where there is none; drawn by plotext."""

    style: Style
    values: Floats
    bad: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Points:
    """Single values, each a sign in its cell."""

    style: Style
    columns: NDArray[np.int64]
    """Dot columns."""
    values: Floats
    sign: str


@dataclass(frozen=True)
class Label:
    """A name at the end of a curve, so that curves can be told apart without colour too."""

    style: Style
    column: int
    """Dot column of the curve's end: the name stands right of it."""
    value: float
    text: str


@dataclass(frozen=True)
class Rule:
    """A dashed level, such as the threshold of clipping."""

    style: Style
    value: float


@dataclass(frozen=True)
class Marks:
    """Dot columns to mark on the axis: clip events, notes."""

    style: Style
    columns: NDArray[np.int64]
    sign: str


Layer = Band | Line | Points | Label | Rule | Marks


def bridge(
    low: Floats, high: Floats, filled: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Dot columns without a measurement between two that have one (fewer steps than dots) take
    values between theirs; a measured NaN stays a gap."""
    at = np.flatnonzero(filled)
    if len(at) < 2 or len(at) == at[-1] - at[0] + 1:
        return low, high
    inner = np.arange(at[0], at[-1] + 1)
    low, high = low.copy(), high.copy()
    for values in (low, high):
        values[inner] = np.interp(inner, at, values[at]).astype(np.float32)
    return low, high

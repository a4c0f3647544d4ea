"""Lines drawn by plotext 6, taken as a matrix of braille cells: no ANSI, no terminal in between."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tui_trainer.ui.widgets.dots import Dots, blank, from_braille

_figure: Any = None


def load() -> None:
    """Import plotext (0.1 s: on a thread, so that no frame waits for it) and free its figure from
    the size of the terminal."""
    global _figure
    import plotext

    plotext.terminal.limit(False, False)
    _figure = plotext.figure


def ready() -> bool:
    """Whether lines can be drawn yet."""
    return _figure is not None


def line(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    width: int,
    height: int,
    limits: tuple[float, float, float, float],
) -> Dots:
    """The dots of a line through (x, y) on `width` × `height` cells; NaN in y interrupts it;
    none before plotext is loaded.

    `limits` are (left, right, bottom, top). Costs about 10 µs a point: hand it at most two
    a column.
    """
    known = np.isfinite(y)
    if not ready() or not known.any() or width < 1 or height < 1:
        return blank(width, height)
    left, right, bottom, top = limits
    figure = _figure
    figure.clear.all()
    figure.plot_size(width, height)
    figure.canvas("default")
    figure.axes(False)
    for axis in ("x", "y"):
        figure.ruler(axis).ticks([]).alignment(lim="edge")
    figure.ruler("x").lim(left, right)
    figure.ruler("y").lim(bottom, top)
    at = np.flatnonzero(known)
    inside = np.clip(y[at], bottom, top)
    signal = figure.signal(x[at].tolist(), inside.tolist(), marker="braille").lines(True)
    for place in np.flatnonzero(np.diff(at) > 1) + 1:
        signal.line(int(place), False)
    figure.draw(signal)
    return from_braille(figure.build().string(colorless=True), width, height)

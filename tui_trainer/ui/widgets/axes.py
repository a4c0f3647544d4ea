"""The frame of a chart: values beside it, steps below it, and the marks on its axis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.segment import Segment
from rich.style import Style

from tui_trainer.ui import formatting
from tui_trainer.ui.glyphs import Glyphs
from tui_trainer.ui.theme import Palette
from tui_trainer.ui.widgets.layers import Layer, Marks
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.scale import Scale

GUTTER = 9
"""Cells left of the plot: a label of 8, right-aligned, and the axis."""


def value_labels(scale: Scale, rows: int) -> dict[int, str]:
    """Row to what is written beside it: round values, evenly spaced."""
    labels: dict[int, str] = {}
    ticks = scale.ticks(rows)
    texts = _texts(ticks, scale.log)
    for value, text in zip(ticks, texts, strict=True):
        place = float(scale.place(np.array([value], np.float64))[0])
        y = round((1 - place) * (4 * rows - 1)) // 4
        if 0 <= y < rows:
            labels[y] = text
    return labels


def _texts(ticks: Sequence[float], log: bool) -> list[str]:
    """The ticks with as many decimals as tell them apart."""
    room = GUTTER - 1
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if log:  # `0.1`, `1`, `1e-30`
        return [f"{tick:.3g}".replace("e+", "e").replace("e-0", "e-") for tick in ticks]
    if len(ticks) < 2 or not 1e-5 < largest < 1e6:
        return [formatting.number(tick, room, 3).strip() if tick else "0" for tick in ticks]
    for decimals in range(7):
        texts = [f"{tick:.{decimals}f}" for tick in ticks]
        exact = all(
            abs(float(t) - tick) < 1e-3 * largest for t, tick in zip(texts, ticks, strict=True)
        )
        if exact and len(set(texts)) == len(texts):
            break
    return [
        text if len(text) <= room else formatting.number(float(text), room, 3) for text in texts
    ]


def step_axis(
    cells: int, steps: tuple[int, int], layers: Sequence[Layer], palette: Palette, glyphs: Glyphs
) -> Row:
    """The rule under the plot with step numbers in it, and marks where something is to be seen.

    A NaN's mark drives a step number away; an event's colours the digit that it falls on.
    """
    line = [(glyphs.axis, palette.faint)] * cells
    for layer in layers:
        bad = getattr(layer, "bad", None)
        if bad is not None and bad.any():
            for column in np.unique(np.flatnonzero(bad) // 2):
                line[column] = (glyphs.failed, palette.error)
    _number_axis(line, steps, palette)
    for layer in layers:
        if isinstance(layer, Marks):
            for column in np.unique(layer.columns // 2):
                if 0 <= column < cells and line[column][1] is not palette.error:
                    digit = line[column][1] is palette.dim
                    line[column] = (line[column][0] if digit else layer.sign, layer.style)
    row: Row = [
        Segment("step ".rjust(GUTTER - 1), palette.dim),
        Segment(glyphs.corner, palette.faint),
    ]
    text, style = "", line[0][1]
    for sign, kind in line:
        if kind is not style:
            row.append(Segment(text, style))
            text, style = "", kind
        text += sign
    row.append(Segment(text, style))
    return row


def _number_axis(line: list[tuple[str, Style]], steps: tuple[int, int], palette: Palette) -> None:
    (start, stop), cells = steps, len(line)
    for tick in _step_ticks(start, stop, max(1, cells // 10)):
        text = f"{tick:,}"
        at = int((tick - start) * cells / max(1, stop - start)) - len(text) // 2
        at = min(max(at, 0), cells - len(text))
        around = line[max(0, at - 1) : at + len(text) + 1]
        if at >= 0 and all(style is palette.faint for _, style in around):
            line[at : at + len(text)] = [(sign, palette.dim) for sign in text]


def _step_ticks(start: int, stop: int, count: int) -> list[int]:
    every = max(1, -(-(stop - start) // max(1, count)))
    power = 10 ** (len(str(every)) - 1)
    every = next(n * power for n in (1, 2, 5, 10) if n * power >= every)
    first = -(-start // every) * every
    return list(range(first, stop + 1, every))

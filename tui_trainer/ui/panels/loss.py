"""Training loss with its smoothed line, and the validation points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from textual.geometry import Size

from tui_trainer.protocol import formatting as f
from tui_trainer.protocol import schema
from tui_trainer.ui.panels.base import Item, Panel, column, title_row
from tui_trainer.ui.widgets.chart import Band, Chart, Label, Layer, Line, Points
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.scale import window
from tui_trainer.ui.widgets.text import user_marks

SHOWN: tuple[int | None, ...] = (None, 1000, 200)
"""Steps that the window may hold: the whole run, or the last so many."""
SMOOTHED_SHARE = 1 / 24
"""The smoothed line averages over about this share of the window."""


class LossPanel(Panel):
    """The chart that everything else explains."""

    quantity = "loss"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.chart = Chart()
        self.shown: int | None = None

    def toggle_log(self) -> bool:
        """Switch between a linear and a logarithmic axis; whether it is logarithmic now."""
        self.chart.log = not self.chart.log
        self.update_rows()
        return self.chart.log

    def cycle_window(self) -> int | None:
        """The next choice of window."""
        self.shown = SHOWN[(SHOWN.index(self.shown) + 1) % len(SHOWN)]
        self.update_rows()
        return self.shown

    def title(self, width: int, items: Sequence[Item] = (), right: str = "") -> Row:
        """`Loss` and its figures."""
        return title_row(self, width, "Loss", items, right)

    def content(self, size: Size) -> Sequence[Row]:
        """Title and chart; the chart's frame is there before the first value."""
        palette, glyphs = self.palette, self.glyphs
        step = self.snapshot.history.table(schema.STEP)
        info = self.snapshot.info
        last = (step.last_step or 0) if step is not None else 0
        steps = window(last, self.shown, info.total_steps if info else None, self.slow_link)
        layers: list[Layer] = []
        items: list[Item] = []
        buckets = 2 * self.chart.plot_width(size.width)
        if step is not None and step.rows:
            seen = step.window([0], *steps, buckets)
            band = Band.of(seen, 0, palette.loss_raw)
            layers.append(band)
            smooth = smoothed(band.low, band.high, max(2.0, buckets * SMOOTHED_SHARE))
            latest = step.latest()
            value = float(latest[1][0]) if latest is not None else None
            bad = value is not None and not np.isfinite(value)
            items.append(("train", f.loss(value, 7), palette.error if bad else palette.loss))
            if last > 3:
                layers.append(Line(palette.loss, smooth))
            else:  # a dot alone is easily overlooked
                few = np.flatnonzero(seen.filled)
                layers.append(Points(palette.loss, few, seen.last[few, 0], glyphs.running))
        layers += self._others(steps, buckets, items)
        layers += self._validation(steps, buckets, items)
        layers += user_marks(self.snapshot, steps, buckets, palette, glyphs)
        if step is not None and (rate := column(step, "learning_rate")) >= 0 and last:
            latest = step.latest()
            value = float(latest[1][rate]) if latest is not None else None
            items.append(("lr", f.scientific(value, 8), palette.text))
        shown = "whole run" if self.shown is None else f"last {self.shown:,}"
        right = f"log {glyphs.separator} {shown}" if self.chart.log else shown
        rows = self.chart.rows(size.width, size.height - 1, steps, layers, palette, glyphs)
        if not last:
            self.chart.say(rows, self.waiting(), palette)
        return [self.title(size.width, items, right), *rows]

    def _others(self, steps: tuple[int, int], buckets: int, items: list[Item]) -> list[Layer]:
        """With several optimizers (a GAN's, say) each minimises a loss of its own: the smoothed
        lines of the others, named at their ends."""
        info, palette = self.snapshot.info, self.palette
        histories = self.snapshot.history.tables_named(schema.STEP)
        if info is None or len(histories) < 2:
            return []
        items[0] = (info.optimizers[0] if info.optimizers else "train", *items[0][1:])
        styles = (palette.accent, palette.warning, palette.good)
        layers: list[Layer] = []
        for number, history in enumerate(histories[1:]):
            latest = history.latest()
            if latest is None:
                continue
            style, name = styles[number % len(styles)], history.table.optimizer
            band = Band.of(history.window([0], *steps, buckets), 0, style)
            line = smoothed(band.low, band.high, max(2.0, buckets * SMOOTHED_SHARE))
            layers.append(Line(style, line, band.bad))
            ends = np.flatnonzero(np.isfinite(line))
            if len(ends):
                layers.append(Label(style, int(ends[-1]), float(line[ends[-1]]), name))
            items.append((name, f.loss(float(latest[1][0]), 7), style))
        return layers

    def _validation(self, steps: tuple[int, int], buckets: int, items: list[Item]) -> list[Layer]:
        history = self.snapshot.history.table(schema.VALIDATION)
        if history is None or not history.rows or (at := column(history, "loss")) < 0:
            return []
        palette = self.palette
        seen = history.window([at], *steps, buckets)
        columns = np.flatnonzero(seen.filled)
        latest = history.latest()
        if latest is not None:
            items.append(("validation", f.loss(float(latest[1][at]), 7), palette.validation))
            accuracy = column(history, "accuracy")
            if accuracy >= 0:
                share = f.percent(float(latest[1][accuracy]), 6, 2)
                items.append(("accuracy", share, palette.validation))
        values = seen.last[columns, 0]
        return [Points(palette.validation, columns, values, self.glyphs.point)]


def smoothed(
    low: NDArray[np.float32], high: NDArray[np.float32], width: float
) -> NDArray[np.float32]:
    """The middle of each column's extent, averaged over a Gaussian of `width` columns; NaN where
    nothing was measured."""
    middle = low / 2 + high / 2
    known = np.isfinite(middle)
    if not known.any():
        return np.full(len(low), np.nan, np.float32)
    reach = int(2 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / (width / 2)) ** 2)
    largest = float(np.abs(middle[known]).max()) or 1.0
    filled = np.where(known, middle / largest, 0.0)
    total = np.convolve(filled, kernel)[reach : reach + len(middle)]
    weight = np.convolve(known.astype(float), kernel)[reach : reach + len(middle)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(known, total / weight * largest, np.nan), np.float32)

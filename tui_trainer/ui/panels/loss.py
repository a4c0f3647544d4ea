"""The loss panel: training loss with its smoothed line (`chart_layers.smooth`), and the validation
points."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from textual.geometry import Size

from tui_trainer.history.series import SeriesReader
from tui_trainer.protocol import formatting, schema
from tui_trainer.protocol.absent import why_absent
from tui_trainer.protocol.events import Skipped
from tui_trainer.ui.panels.base import (
    Figure,
    Panel,
    user_event_marks,
    waiting_message,
)
from tui_trainer.ui.widgets.axes import step_window
from tui_trainer.ui.widgets.chart import Chart, put_message
from tui_trainer.ui.widgets.chart_layers import AxisMarks, Band, Label, Layer, Line, Points, smooth
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.related import related_curves, related_legend

WINDOWS: tuple[int | None, ...] = (None, 1000, 200)
"""Steps that the chart can show: the whole run, or the last ones."""
FEW_STEPS = 3
"""Up to this many steps are drawn as points, since a single dot is easily overlooked."""
OTHER_LOSS_STYLES = ("accent", "warning", "good")
"""Styles of the losses of further optimizers."""


class LossPanel(Panel):
    """The training loss as a band of all values with a smoothed line; validation as points."""

    lessons = ("loss-graph",)
    panel_title = "Loss"
    quantity = "loss"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.chart = Chart()
        self.max_steps: int | None = None
        """Steps that the chart shows; None for the whole run."""

    def toggle_log(self) -> None:
        """Switch between a linear and a logarithmic axis."""
        self.chart.toggle_log()
        self.update_rows()

    def cycle_window(self) -> int | None:
        """Show the next number of steps, and return it."""
        self.max_steps = WINDOWS[(WINDOWS.index(self.max_steps) + 1) % len(WINDOWS)]
        self.update_rows()
        return self.max_steps

    def content(self, size: Size) -> Sequence[Row]:
        """Title and chart; the axes are drawn even before the first value."""
        palette, glyphs = self.palette, self.glyphs
        tables = self.snapshot.history.tables_named(schema.STEP)
        info = self.snapshot.info
        last_step = (tables[0].last_step or 0) if tables else 0
        total_steps = info.total_steps if info else None
        steps = step_window(last_step, self.max_steps, total_steps, self.slow_link)
        columns = 2 * self.chart.plot_width(size.width)
        layers, others = related_curves(
            self, self.snapshot.related, schema.STEP, "loss", steps, columns
        )
        layers += related_curves(
            self, self.snapshot.related, schema.VALIDATION, "loss", steps, columns, points=True
        )[0]
        figures: list[Figure] = []
        for number, table in enumerate(tables):
            layers += self._training_loss(table, number, steps, columns)
            figures += self._training_figures(table, number, len(tables) > 1)
        for validation in self.snapshot.history.tables_named(schema.VALIDATION):
            if validation.rows:
                layers += self._validation_points(validation, steps, columns)
                figures += self._validation_figures(validation)
        skipped = [event.step for event in self.snapshot.events if isinstance(event, Skipped)]
        if skipped:
            style, sign = palette.warning, glyphs.failed
            layers.append(AxisMarks.at_steps(skipped, steps, columns, style, sign))
            figures.append(("skipped", f"{len(skipped):,}", palette.warning))
        layers += user_event_marks(self, self.snapshot, steps, columns)
        learning_rate = tables[0].newest("learning_rate") if tables else None
        if learning_rate is not None and why_absent(learning_rate) is None:
            figures.append(("lr", formatting.scientific(learning_rate, 8), palette.text))
        legend = related_legend(self, others, size.width)
        height = size.height - 1 - len(legend)
        rows = self.chart.rows(size.width, height, steps, layers, palette, glyphs)
        if not last_step:
            put_message(rows, waiting_message(self.snapshot), palette.dim)
        window = "whole run" if self.max_steps is None else f"last {self.max_steps:,}"
        right = f"log {glyphs.separator} {window}" if self.chart.drawn_log else window
        return [self.title_line(size.width, figures, right), *legend, *rows]

    def _training_loss(
        self, table: SeriesReader, number: int, steps: tuple[int, int], columns: int
    ) -> list[Layer]:
        """The loss of the first optimizer in full. The losses of further optimizers (as in a GAN)
        are smoothed lines with the optimizer's name at the end."""
        index = table.column("loss")
        if index is None or not table.rows:
            return []
        window = table.window([index], *steps, columns)
        if number:
            style = self.style(_other_style(number))
            band = Band.from_window(window, 0, style)
            line = smooth(band.low, band.high)
            ends = np.flatnonzero(np.isfinite(line))[-1:]
            names = [Label(style, int(x), float(line[x]), table.table.optimizer) for x in ends]
            return [Line(style, line, band.nonfinite), *names]
        band = Band.from_window(window, 0, self.palette.loss_raw)
        if (table.last_step or 0) > FEW_STEPS:
            return [band, Line(self.palette.loss, smooth(band.low, band.high))]
        at = np.flatnonzero(window.filled)
        return [band, Points(self.palette.loss, at, window.last[at, 0], self.glyphs.running)]

    def _training_figures(self, table: SeriesReader, number: int, several: bool) -> list[Figure]:
        value = table.newest("loss")
        if value is None:
            return []
        label = "train"
        if several and (info := self.snapshot.info) is not None and info.optimizers:
            label = table.table.optimizer if number else info.optimizers[0]
        style = _other_style(number) if number else "loss"
        if (why := why_absent(value)) is not None:
            reason = why.reason.partition(":")[0]
            return [(label, f"{self.glyphs.missing} {reason}", self.palette.text)]
        style = style if number or np.isfinite(value) else "error"
        figures: list[Figure] = [(label, formatting.loss(value, 7), self.style(style))]
        evaluations = table.newest("evaluations")
        if evaluations is not None and evaluations > 1:
            text = formatting.counted(int(evaluations), "evaluation")
            figures.append(("", text, self.palette.dim))
        return figures

    def _validation_points(
        self, table: SeriesReader, steps: tuple[int, int], columns: int
    ) -> list[Layer]:
        index = table.column("loss")
        if index is None:
            return []
        window = table.window([index], *steps, columns)
        at = np.flatnonzero(window.filled)
        return [Points(self.palette.validation, at, window.last[at, 0], self.glyphs.point)]

    def _validation_figures(self, table: SeriesReader) -> list[Figure]:
        figures: list[Figure] = []
        style = self.palette.validation
        if (loss := table.newest("loss")) is not None:
            figures.append(("validation", formatting.loss(loss, 7), style))
        if (accuracy := table.newest("accuracy")) is not None:
            figures.append(("accuracy", formatting.percent(accuracy, 6, 2), style))
        return figures


def _other_style(number: int) -> str:
    return OTHER_LOSS_STYLES[(number - 1) % len(OTHER_LOSS_STYLES)]

"""The chart of one attention statistic of one layer, as the dashboard shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from textual.geometry import Size

from tui_trainer.protocol import schema
from tui_trainer.protocol.schema import AttentionInfo
from tui_trainer.ui.panels.attention.statistics import BY_KEY, PART_STYLES, short_layer_name
from tui_trainer.ui.panels.base import Figure, Panel, unavailable_reason
from tui_trainer.ui.widgets.chart import Band, Chart, Label, Layer, Line, smooth
from tui_trainer.ui.widgets.lines import Row
from tui_trainer.ui.widgets.scale import step_window
from tui_trainer.ui.widgets.table import NOT_COMPARABLE

TREND_STATISTICS = tuple(BY_KEY[key] for key in ("drift", "cos", "distance", "norm", "grad_cos"))
MIN_HEIGHT = 5
VALUE_WIDTH = 7


class TrendChart(Panel):
    """One statistic of one layer over the run: a curve for each of its parts."""

    quantity = "attention"

    def __init__(self, statistic: int = 0, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.chart = Chart()
        self.layer_index = 0
        """Index of the layer that is shown."""
        self._number = statistic

    def cycle_statistic(self) -> None:
        """Show the next statistic."""
        self._number = (self._number + 1) % len(TREND_STATISTICS)
        self.chart = Chart()
        self.update_rows()

    def rows(self, size: Size) -> Sequence[Row]:
        """Empty where the table above already says why there is no attention."""
        return [] if unavailable_reason(self.snapshot, self.quantity) else self.content(size)

    def content(self, size: Size) -> Sequence[Row]:
        """Title and chart."""
        if size.height < MIN_HEIGHT:
            return []
        snapshot, info = self.snapshot, self.snapshot.info
        step_table = snapshot.history.table(schema.STEP)  # the same window as that of the loss
        last_step = (step_table.last_step or 0) if step_table is not None else 0
        total_steps = info.total_steps if info else None
        steps = step_window(last_step, None, total_steps, self.slow_link)
        layers: list[Layer] = []
        figures: list[Figure] = []
        right = ""
        if info and info.attention:
            layer = info.attention[min(self.layer_index, len(info.attention) - 1)]
            layers, figures = self._curves(layer, steps, size.width)
            right = short_layer_name(layer)
            if self._averages:
                right = f"{right} {self.glyphs.separator} mean"
        self.panel_title = TREND_STATISTICS[self._number].label
        title = self.title_line(size.width, figures, right)
        height = size.height - 1
        return [
            title,
            *self.chart.rows(size.width, height, steps, layers, self.palette, self.glyphs),
        ]

    @property
    def _averages(self) -> bool:
        """Whether curves are smoothed: gradients scatter too much to be read otherwise."""
        return TREND_STATISTICS[self._number].key == "grad_cos"

    def _curves(
        self, layer: AttentionInfo, steps: tuple[int, int], width: int
    ) -> tuple[list[Layer], list[Figure]]:
        """The curves of a layer with their names at their ends, and the newest values."""
        statistic = TREND_STATISTICS[self._number]
        location = statistic.location(self.snapshot, layer)
        newest = location.history.latest() if location is not None else None
        if location is None or newest is None:
            return [], []
        columns = [location.columns[statistic.index(part)] for part in statistic.parts]
        window = location.history.window(columns, *steps, 2 * self.chart.plot_width(width))
        curves: list[Layer] = []
        names: list[Layer] = []
        figures: list[Figure] = []
        for number, part in enumerate(statistic.parts):
            if not layer.comparable(part):
                figures.append((part, NOT_COMPARABLE.rjust(VALUE_WIDTH), self.palette.dim))
                continue
            style = self.style(PART_STYLES[part])
            band = Band.from_window(window, number, style)
            if self._averages:
                band = replace(band, high=smooth(band.low, band.high))
                curves.append(Line(style, band.high, band.nonfinite))
            else:
                curves.append(band)
            ends = np.flatnonzero(np.isfinite(band.high))[-1:]
            names += [Label(style, int(x), float(band.high[x]), part) for x in ends]
            value = float(newest[1][columns[number]])
            figures.append((part, statistic.format(value, VALUE_WIDTH), style))
        return [*curves, *names], figures

"""The error of the numerical gradient against h, and descent with three learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rich.segment import Segment
from textual.geometry import Size

from tui_trainer.learn.scalar.graph import (
    SWEEP_HIGH,
    SWEEP_LOW,
    Descent,
    ScalarGraph,
    SweepPoint,
    sweep,
    sweep_summary,
    three_rates,
)
from tui_trainer.learn.scalar.steps import update_line
from tui_trainer.protocol.formatting import short
from tui_trainer.ui.panels.scalar_graph.graph_view import joined_spans
from tui_trainer.ui.panels.scalar_graph.state import GraphState
from tui_trainer.ui.widgets.axes import AXIS_WIDTH, Scale, fit_scale, value_labels
from tui_trainer.ui.widgets.chart import Canvas
from tui_trainer.ui.widgets.chart_layers import ChartMarker, Layer, Line, Points
from tui_trainer.ui.widgets.lines import LineView, Row


class PlotView(LineView):
    """A title, some lines of text, and a plot with its own axes."""

    def __init__(self, state: GraphState, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.state = state

    def title_row(self, width: int, title: str, legend: Sequence[tuple[str, str]]) -> Row:
        """`error against h   central  forward ───`"""
        used = len(title) + sum(len(text) + 2 for text, _ in legend) + 1
        spans = [(title, "title")]
        for text, style in legend:
            spans += [("  ", "text"), (text, style)]
        return self.styled([*spans, (f" {self.glyphs.rule * max(0, width - used)}", "rule")])

    def plot(
        self, size: Size, scale: Scale, layers: Sequence[Layer], ticks: Sequence[tuple[float, str]],
        name: str,
    ) -> list[Row]:  # fmt: skip
        """A plot with labels of the value axis, and `ticks` (share of the width, text) below."""
        width, height = max(1, size.width - AXIS_WIDTH), max(1, size.height - 1)
        canvas = Canvas(width, height, scale, self.palette, self.glyphs)
        canvas.draw(layers)
        for layer in layers:
            if isinstance(layer, ChartMarker):
                canvas.draw_marker(layer, (0, width))
        labels = value_labels(scale, height)
        rows = []
        for y, plotted in enumerate(canvas.rows()):
            axis = self.glyphs.tick if y in labels else self.glyphs.vertical
            rows.append([Segment(labels.get(y, "").rjust(AXIS_WIDTH - 1), self.palette.dim),
                         Segment(axis, self.palette.faint), *plotted])  # fmt: skip
        cells = [(self.glyphs.axis, "faint")] * width
        for share, text in ticks:
            x = min(max(round(share * (width - 1)) - len(text) // 2, 0), width - len(text))
            if x >= 0 and all(
                style == "faint" for _, style in cells[max(0, x - 1) : x + len(text)]
            ):
                cells[x : x + len(text)] = [(character, "dim") for character in text]
        axis_row = self.styled([(f"{name} ".rjust(AXIS_WIDTH), "dim")])
        joined = joined_spans([c for c, _ in cells], [s for _, s in cells])
        return [*rows, [*axis_row, *self.styled(joined)]]

    def message(self, size: Size, title: Row, text: str) -> list[Row]:
        """A text in place of the plot."""
        return [title, [], *self.wrapped(size.width, text, "dim")]

    def wrapped(self, width: int, text: str, style: str = "text") -> list[Row]:
        """A text on as many lines as it takes."""
        return self.wrapped_rows(text, style, max(11, width - 1), indent=1)


class SweepChart(PlotView):
    """The error of the numerical gradient of the selected node against h, both logarithmic."""

    lessons = ("gradient",)

    def __init__(self, state: GraphState, *, id: str | None = None) -> None:
        super().__init__(state, id=id)
        self._key: tuple[object, ...] = ()
        self._points: list[SweepPoint] = []

    def points(self, count: int) -> list[SweepPoint]:
        """Computed again only for another graph, another node or another width."""
        key = (self.state.graph, self.state.selected, count)
        if not self._key or self._key[0] is not key[0] or self._key[1:] != key[1:]:
            self._key = key
            self._points = sweep(self.state.graph, self.state.selected, count)
        return self._points

    def rows(self, size: Size) -> Sequence[Row]:
        graph, index = self.state.graph, self.state.selected
        name = graph.nodes[index].name
        say, output = self.state.say, graph.output_name
        legend = [(say("central"), "q"), (say("forward"), "k")]
        heading = say("error of the numerical {derivative}", derivative=f"d{output}/d{name}")
        title = self.title_row(size.width, heading, legend)
        if graph.gradients[index] is None:
            text = say(
                "{output} does not depend on {name}, or {name} is a constant",
                output=output,
                name=name,
            )
            return self.message(size, title, text)
        width = max(1, size.width - AXIS_WIDTH)
        points = self.points(max(2, 2 * width))
        central, forward = (
            np.array([value or np.nan for value in values], np.float32)
            for values in ([p.central for p in points], [p.forward for p in points])
        )
        known = np.concatenate([v[np.isfinite(v)] for v in (central, forward)])
        summary = self.state.translated(sweep_summary(graph, index, points))
        if not len(known):
            return self.message(size, title, summary)
        scale = fit_scale(float(known.min()), float(known.max()), log=True)
        at = (math.log10(self.state.h) - SWEEP_LOW) / (SWEEP_HIGH - SWEEP_LOW)
        layers: list[Layer] = [
            Line(self.palette.k, forward),
            Line(self.palette.q, central),
        ]
        if 0 <= at <= 1:
            layers.append(ChartMarker(self.palette.dim, round(at * (width - 1))))
        ticks = [
            (
                (exponent - SWEEP_LOW) / (SWEEP_HIGH - SWEEP_LOW),
                f"1e{exponent}" if exponent else "1",
            )
            for exponent in range(round(SWEEP_LOW), round(SWEEP_HIGH) + 1, 3)
        ]
        lines = self.wrapped(size.width, summary)
        left = Size(size.width, size.height - 1 - len(lines))
        return [title, *lines, *self.plot(left, scale, layers, ticks, "h")]


RATE_STYLES = ("q", "good", "error")
RATE_MARKERS, ASCII_RATE_MARKERS = "○●◆", "o#x"
SHOWN_STEPS = 5


class DescentChart(PlotView):
    """L against the selected input, and where three learning rates lead."""

    lessons = ("forward-backward", "updates")

    def __init__(self, state: GraphState, *, id: str | None = None) -> None:
        super().__init__(state, id=id)
        self._known: tuple[ScalarGraph, str, Descent] | None = None

    def descent(self, name: str) -> Descent:
        """Computed again only for another graph or another input."""
        graph = self.state.graph
        if self._known is None or self._known[0] is not graph or self._known[1] != name:
            self._known = (graph, name, three_rates(graph, name))
        return self._known[2]

    def rows(self, size: Size) -> Sequence[Row]:
        node = self.state.graph.nodes[self.state.selected]
        title = self.title_row(size.width, f"{node.name} <- {node.name} - lr*G", [])
        if not node.is_input:
            text = self.state.say(
                "{name} is computed: choose an input with the arrow keys to move it", name=node.name
            )
            return self.message(size, title, text)
        descent = self.descent(node.name)
        if not descent.runs:
            return self.message(size, title, self.state.translated(descent.verdict))
        markers = ASCII_RATE_MARKERS if self.glyphs.ascii else RATE_MARKERS
        lines = self.wrapped(size.width, self.state.translated(descent.verdict))
        lines += self._run_lines(size.width, descent, markers)
        left = Size(size.width, size.height - 1 - len(lines))
        if left.height < 4:
            return [title, *lines]
        return [title, *lines, *self._valley(left, descent, markers)]

    def _run_lines(self, width: int, descent: Descent, markers: str) -> list[Row]:
        """The first update and the end of each rate, or only the rate where both do not fit."""
        say, output = self.state.say, self.state.graph.output_name
        labels = [self.state.translated(run.label) for run in descent.runs]
        ends = [
            say("it is undefined") if run.left_domain
            else say("{count} steps: {output} = {value}", count=len(run.outputs) - 1,
                     output=output, value=short(run.outputs[-1]))
            for run in descent.runs
        ]  # fmt: skip
        updates = [update_line(descent, number) for number in range(len(descent.runs))]
        label_width, end_width = max(map(len, labels)), max(map(len, ends))
        if label_width + max(map(len, updates)) + end_width + 7 > width:
            updates = [f"lr = {run.learning_rate:.3g}" for run in descent.runs]
        update_width = max(map(len, updates))
        rates = zip(labels, updates, ends, markers, RATE_STYLES, strict=True)
        return [
            self.styled([
                (f" {marker} {label:<{label_width}} ", style),
                (f"{update:<{update_width}}   ", "text"), (end, "dim"),
            ])
            for label, update, end, marker, style in rates
        ]  # fmt: skip

    def _valley(self, size: Size, descent: Descent, markers: str) -> list[Row]:
        """The output as a function of the input, with the weights of the three runs on it."""
        graph, name = self.state.graph, descent.name
        low, high = _span(descent)
        columns = 2 * max(1, size.width - AXIS_WIDTH)
        weights = np.linspace(low, high, columns)
        outputs = [graph.output_with(name, float(weight)) for weight in weights]
        curve = np.array([np.nan if v is None else v for v in outputs], np.float32)
        layers: list[Layer] = [Line(self.palette.faint, curve)]
        for run, marker, style in zip(descent.runs, markers, RATE_STYLES, strict=True):
            shown = [
                (weight, output)
                for weight, output in zip(
                    run.weights[:SHOWN_STEPS], run.outputs[:SHOWN_STEPS], strict=True
                )
                if low <= weight <= high
            ]
            at = [round((weight - low) / (high - low) * (columns - 1)) for weight, _ in shown]
            values = np.array([output for _, output in shown], np.float32)
            layers.append(Points(self.style(style), np.array(at, np.int64), values, marker))
        finite = curve[np.isfinite(curve)]
        if not len(finite):
            return []
        scale = fit_scale(float(finite.min()), float(finite.max()), log=False)
        ticks = [(share, f"{low + share * (high - low):.3g}") for share in (0, 0.25, 0.5, 0.75, 1)]
        return self.plot(size, scale, layers, ticks, name)


def _span(descent: Descent) -> tuple[float, float]:
    """The weights to show: those of the first two runs, and the first step of the third."""
    small, right, large = descent.runs
    shown = [*small.weights[:SHOWN_STEPS], *right.weights[:SHOWN_STEPS], *large.weights[:2]]
    low, high = min(shown), max(shown)
    margin = (high - low) * 0.15 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin

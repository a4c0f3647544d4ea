"""Panels of the scalar graph: the graph itself, the current step, the table of nodes, the error of
the numerical gradient against h, and descent with three learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import wrap

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from textual.geometry import Size

from tui_trainer.learn.scalar.graph import (
    DEFAULT_H,
    SWEEP_HIGH,
    SWEEP_LOW,
    Descent,
    ScalarGraph,
    SweepPoint,
    sweep,
    sweep_summary,
    three_rates,
)
from tui_trainer.learn.scalar.layout import Layout, layout
from tui_trainer.learn.scalar.text import GraphStep, short, steps_of, update_line
from tui_trainer.learn.scalar.torch_process import TorchGradients
from tui_trainer.protocol import formatting
from tui_trainer.ui.widgets.axes import AXIS_WIDTH, value_labels
from tui_trainer.ui.widgets.chart import Canvas
from tui_trainer.ui.widgets.layers import Layer, Line, Moment, Points
from tui_trainer.ui.widgets.lines import LineView, Row, ScrollingLines
from tui_trainer.ui.widgets.scale import Scale, fit_scale
from tui_trainer.ui.widgets.table import Cell, CellValue, TableColumn, VirtualTable

AGREE = 1e-9
"""Gradients that differ by less than this share are equal but for rounding."""


@dataclass
class GraphState:
    """What the panels show."""

    graph: ScalarGraph
    h: float = DEFAULT_H
    position: int = 0
    """How many of the steps have been made."""
    selected: int = 0
    """Index of a node."""
    autograd: TorchGradients | None = None
    """None while PyTorch has not answered."""
    no_torch: bool = False
    """PyTorch gave no answer."""
    steps: list[GraphStep] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.set_graph(self.graph)

    def set_graph(self, graph: ScalarGraph) -> None:
        """Another expression, or other values."""
        self.graph = graph
        self.steps = steps_of(graph)
        self.position = min(self.position, len(self.steps))
        self.selected = min(self.selected, len(graph.nodes) - 1)
        self.autograd = None

    @property
    def current(self) -> GraphStep | None:
        """The step that was made last."""
        return self.steps[self.position - 1] if self.position else None

    @property
    def finished(self) -> bool:
        return self.position == len(self.steps)

    def known_values(self) -> set[int]:
        """The nodes that have a value by now."""
        made = {step.node for step in self.steps[: self.position] if not step.backward}
        return made | {i for i, node in enumerate(self.graph.nodes) if not node.is_computed}

    def known_gradients(self) -> dict[int, float]:
        """The gradients so far, of which some may yet grow."""
        made = sum(step.backward for step in self.steps[: self.position])
        gradients: dict[int, float] = {}
        for step in self.graph.backward[:made]:
            gradients.setdefault(step.node, step.gradient)
            gradients.update({each.to: each.total for each in step.contributions})
        return gradients

    def touched(self) -> frozenset[int]:
        """The operands of the node of the current step."""
        step = self.current
        return frozenset(self.graph.nodes[step.node].inputs) if step is not None else frozenset()

    def progress(self) -> str:
        """`forward 2 of 3`, `backward 1 of 3`"""
        step, forward = self.current, sum(not each.backward for each in self.steps)
        if step is None:
            return "before the first step"
        if not step.backward:
            return f"forward {self.position} of {forward}"
        return f"backward {self.position - forward} of {len(self.steps) - forward}"

    def agreement(self) -> str:
        """Whether PyTorch's gradients are those on screen."""
        if self.autograd is None:
            return "no PyTorch" if self.no_torch else "asking PyTorch"
        pairs = zip(self.autograd.gradients, self.graph.gradients, strict=True)
        apart = max((_difference(theirs, ours) for theirs, ours in pairs), default=0.0)
        word = "agrees" if apart <= AGREE else f"differs by {apart:.0e}"
        return f"{self.autograd.version} {word}"


def _difference(theirs: float | None, ours: float | None) -> float:
    """Relative to the larger one; 0 where both are missing or the same infinity or nan."""
    a, b = theirs or 0.0, ours or 0.0
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    largest = max(abs(a), abs(b))
    return abs(a - b) / largest if math.isfinite(largest) else math.inf


# ---------------------------------------------------------------- the graph

NORTH, SOUTH, WEST, EAST = 1, 2, 4, 8
BOX = dict(enumerate(" ╵╷│╴┘┐┤╶└┌├─┴┬┼"))
"""Line characters by the directions in which they lead."""
MAX_NAME, VALUE_WIDTH = 8, 7
MAX_GAP = 12
SIGNS = {"neg": "-"}
"""Where the sign is not the operation itself."""


@dataclass(frozen=True)
class Geometry:
    """Cells of the columns and rows of a graph."""

    left: tuple[int, ...]
    """First cell of each column of nodes."""
    channel: tuple[int, ...]
    """Cell left of each column in which its edges run up and down."""
    node_width: int
    pitch: int
    """Lines from one row of nodes to the next."""
    width: int
    height: int


def geometry(graph: ScalarGraph, placed: Layout, size: Size) -> Geometry:
    """Gaps as wide as the room allows, with the signs of the operations in them."""
    name = min(MAX_NAME, max(len(node.name) for node in graph.nodes))
    node_width = name + 1 + VALUE_WIDTH
    signs = [0] * placed.columns
    for node, (column, _) in zip(graph.nodes, placed.places, strict=True):
        if node.is_computed:
            signs[column] = max(signs[column], len(SIGNS.get(node.operation, node.operation)))
    gaps = [0] + [3 + sign for sign in signs[1:]]
    spare = size.width - placed.columns * node_width - sum(gaps)
    extra = max(0, min(MAX_GAP - 4, spare // max(1, placed.columns - 1)))
    left, channel, x = [], [], 0
    for column in range(placed.columns):
        x += gaps[column] + (extra if column else 0)
        left.append(x)
        channel.append(x - signs[column] - 2)
        x += node_width
    pitch = 3 if placed.rows * 3 - 1 <= size.height else 2
    height = round((placed.rows - 1) * pitch) + 2
    return Geometry(tuple(left), tuple(channel), node_width, pitch, x, height)


class GraphView(ScrollingLines, can_focus=False):
    """The nodes with their values and gradients. It follows the current step."""

    DEFAULT_CSS = "GraphView { width: 1fr; height: 1fr; }"

    def __init__(self, state: GraphState, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.state = state
        self._drawn: list[Row] = []
        self._width = 0

    def show(self) -> None:
        """Draw the state again, and bring its node into view."""
        self._draw()
        self.lines_changed()
        self._follow()

    def view_resized(self) -> None:
        self.show()

    def line_count(self) -> int:
        return len(self._drawn)

    def line(self, index: int) -> Row:
        return self._drawn[index]

    def line_width(self) -> int:
        return self._width

    def discard_drawn(self) -> None:
        super().discard_drawn()
        self._draw()

    def _geometry(self) -> tuple[Layout, Geometry]:
        placed = layout(self.state.graph.expression)
        return placed, geometry(self.state.graph, placed, self.size)

    def _place(self, placed: Layout, cells: Geometry, index: int) -> tuple[int, int]:
        column, row = placed.places[index]
        return cells.left[column], round(row * cells.pitch)

    def _draw(self) -> None:
        if not self.size.width or not self.is_attached:
            return
        state = self.state
        placed, cells = self._geometry()
        texts = [[" "] * cells.width for _ in range(cells.height)]
        styles = [["text"] * cells.width for _ in range(cells.height)]
        lines = np.zeros((cells.height, cells.width), np.uint8)
        active = state.current.node if state.current is not None else -1
        for live in (False, True):  # edges of the current step on top
            for source, target in placed.edges:
                if (target == active) == live:
                    style = "accent" if live else "faint"
                    self._edge(placed, cells, source, target, lines, styles, style)
        for y, x in np.argwhere(lines):
            texts[y][x] = BOX[int(lines[y, x])]
        values, gradients = state.known_values(), state.known_gradients()
        for index in range(len(state.graph.nodes)):
            self._node(placed, cells, index, texts, styles, index in values, gradients.get(index))
        self._width = cells.width
        self._drawn = [
            self.styled(_joined(row, names)) for row, names in zip(texts, styles, strict=True)
        ]

    def _edge(
        self,
        placed: Layout,
        cells: Geometry,
        source: int,
        target: int,
        lines: NDArray[np.uint8],
        styles: list[list[str]],
        style: str,
    ) -> None:
        """From the right of the operand to the channel of the node, along it, and to the node."""
        x1, y1 = self._place(placed, cells, source)
        x2, y2 = self._place(placed, cells, target)
        channel = cells.channel[placed.places[target][0]]

        def mark(x: int, y: int, bits: int) -> None:
            lines[y, x] |= bits
            styles[y][x] = style

        for x in range(x1 + cells.node_width, channel):
            mark(x, y1, WEST | EAST)
        mark(channel, y1, WEST)
        low, high = sorted((y1, y2))
        for y in range(low, high + 1):
            mark(channel, y, (NORTH if y > low else 0) | (SOUTH if y < high else 0))
        mark(channel, y2, EAST)
        for x in range(channel + 1, x2):
            mark(x, y2, WEST | EAST)

    def _node(
        self,
        placed: Layout,
        cells: Geometry,
        index: int,
        texts: list[list[str]],
        styles: list[list[str]],
        known: bool,
        gradient: float | None,
    ) -> None:
        state, node = self.state, self.state.graph.nodes[index]
        x, y = self._place(placed, cells, index)
        current = state.current
        is_current = current is not None and current.node == index

        def write(at: int, line: int, text: str, style: str) -> None:
            for offset, character in enumerate(text):
                texts[line][at + offset], styles[line][at + offset] = character, style

        if node.is_computed:
            sign = SIGNS.get(node.operation, node.operation)
            write(x - len(sign) - 1, y, sign, "accent" if is_current else "strong")
        name_width = cells.node_width - VALUE_WIDTH - 1
        name = node.name if len(node.name) <= name_width else f"{node.name[: name_width - 1]}…"
        if node.operation == "constant":
            name = ""
        is_touched = index in state.touched()
        style = "current" if is_current else "accent bold" if is_touched else "strong"
        if index == state.selected and not is_current:
            style += " underline"
        write(x, y, name.ljust(name_width), style if name else "text")
        value = formatting.number(state.graph.values[index], VALUE_WIDTH) if known else ""
        write(x + name_width, y, f" {value.rjust(VALUE_WIDTH)}", "text")
        mark, shown = "", ""
        if gradient is not None:
            mark, shown = "g" if self.glyphs.ascii else "∇", formatting.number(gradient, 7)
        write(x, y + 1, mark.ljust(name_width), "norm")
        is_new = is_touched and current is not None and current.backward
        write(
            x + name_width, y + 1, f" {shown.rjust(VALUE_WIDTH)}", "norm bold" if is_new else "norm"
        )

    def _follow(self) -> None:
        """Scroll so that the node of the current step and its operands, or else the selected node,
        are in view."""
        if not self.size.width or not self.is_attached:
            return
        placed, cells = self._geometry()
        step = self.state.current
        shown = [self.state.selected] if step is None else [step.node, *self.state.touched()]
        places = [self._place(placed, cells, index) for index in shown]
        width, height = self.view_size
        left, top = self.scroll_offset
        x1, x2 = min(x for x, _ in places), max(x for x, _ in places) + cells.node_width
        y1, y2 = min(y for _, y in places), max(y for _, y in places) + 2
        self.scroll_to(
            min(max(left, x2 - width), x1), min(max(top, y2 - height), y1),
            animate=False, force=True,
        )  # fmt: skip


def _joined(characters: Sequence[str], styles: Sequence[str]) -> list[tuple[str, str]]:
    """Neighbours of one style in one span."""
    spans: list[tuple[str, str]] = []
    for character, style in zip(characters, styles, strict=True):
        if spans and spans[-1][1] == style:
            spans[-1] = (spans[-1][0] + character, style)
        else:
            spans.append((character, style))
    return spans


# ---------------------------------------------------------------- the current step


class StepText(LineView):
    """The current step, with the chain rule in numbers."""

    DEFAULT_CSS = "StepText { width: 1fr; height: 4; }"

    def __init__(self, state: GraphState, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.state = state

    def rows(self, size: Size) -> Sequence[Row]:
        """A title, and a line for each operand."""
        step, output = self.state.current, self.state.graph.output_name
        if step is None:
            title = "p computes the first node; space goes to the end and back"
            lines: Sequence[str] = (
                "forward: every node gets its value from its operands",
                f"backward: every node passes d{output}/d(node) on, times the local derivative",
            )
        else:
            title = ("backward: " if step.backward else "forward: ") + step.title
            lines = step.lines
        rows = [self.styled([(title, "title"), (f" {self._rule(size.width, title)}", "rule")])]
        return [*rows, *(self.styled([(f" {line}", "text")]) for line in lines)]

    def _rule(self, width: int, title: str) -> str:
        return self.glyphs.rule * max(0, width - len(title) - 1)


class GraphTitle(LineView):
    """The expression, how far the steps have come, and whether PyTorch agrees."""

    DEFAULT_CSS = "GraphTitle { height: 1; }"

    def __init__(self, state: GraphState) -> None:
        super().__init__()
        self.state = state

    def rows(self, size: Size) -> Sequence[Row]:
        state = self.state
        style = "dim" if state.autograd is None else "good"
        right = [(state.progress(), "accent"), ("  ", "text"), (state.agreement(), style)]
        room = size.width - sum(len(text) for text, _ in right) - 4
        text = state.graph.expression.text
        text = text if len(text) <= room else f"{text[: max(0, room - 1)]}…"
        return [self.styled([(f" {text.ljust(room)}", "strong"), ("  ", "text"), *right])]


# ---------------------------------------------------------------- the table of nodes


class NodeTable(VirtualTable):
    """Every node with its value and gradient, PyTorch's gradient, and the numerical one."""

    DEFAULT_CSS = "NodeTable { width: 1fr; height: 1fr; }"

    def __init__(self, state: GraphState, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.state = state
        self._gradients: dict[int, float] = {}
        self._values: set[int] = set()
        self.columns = (
            TableColumn("name", "node", 6, self._name_of, left=True),
            TableColumn("operation", "operation", 0, self._operation_of, left=True),
            TableColumn("value", "value", 8, self._value_of),
            TableColumn("gradient", "gradient", 8, self._gradient_of, style="norm"),
            TableColumn("numerical", "numerical", 12, self._numerical_of, _nine_digits),
            TableColumn("autograd", "PyTorch", 8, self._autograd_of, style="norm"),
            TableColumn("error", "error", 8, self._error_of, formatting.scientific),
            TableColumn("product", "as a product", 22, self._product_of, left=True, style="dim"),
        )

    def show(self) -> None:
        """Draw the state again."""
        self._gradients = self.state.known_gradients()
        self._values = self.state.known_values()
        self.set_order(np.arange(len(self.state.graph.nodes)))
        if self.cursor != self.state.selected:
            self.cursor = self.state.selected
            self._scroll_to_cursor()
        self.update_rows()

    def _name_of(self, row: int) -> CellValue:
        step = self.state.current
        is_current = step is not None and step.node == row
        return Cell(self.state.graph.nodes[row].name, "accent bold" if is_current else "strong")

    def _operation_of(self, row: int) -> CellValue:
        graph = self.state.graph
        return Cell(graph.expression.operation_text(row) or graph.nodes[row].operation, "dim")

    def _value_of(self, row: int) -> CellValue:
        return self.state.graph.values[row] if row in self._values else None

    def _gradient_of(self, row: int) -> CellValue:
        return self._gradients.get(row)

    def _autograd_of(self, row: int) -> CellValue:
        if self.state.autograd is None or row not in self._gradients:
            return None
        return self.state.autograd.gradients[row]

    def _numerical_of(self, row: int) -> CellValue:
        if row not in self._gradients:
            return None
        return self.state.graph.numerical(row, self.state.h)

    def _error_of(self, row: int) -> CellValue:
        numerical, gradient = self._numerical_of(row), self.state.graph.gradients[row]
        if not isinstance(numerical, float) or gradient is None or not self.state.finished:
            return None
        return abs(numerical - gradient)

    def _product_of(self, row: int) -> CellValue:
        return self.state.graph.formulas[row] if row in self._gradients else ""


def _nine_digits(value: float | None, width: int) -> str:
    return formatting.number(value, width, 9)


# ---------------------------------------------------------------- charts


class PlotView(LineView):
    """A title, some lines of text, and a plot with axes of its own."""

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
            if isinstance(layer, Moment):
                canvas.draw_moment(layer, (0, width))
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
        joined = _joined([c for c, _ in cells], [s for _, s in cells])
        return [*rows, [*axis_row, *self.styled(joined)]]

    def message(self, size: Size, title: Row, text: str) -> list[Row]:
        """A text in place of the plot."""
        return [title, [], *self.wrapped(size.width, text, "dim")]

    def wrapped(self, width: int, text: str, style: str = "text") -> list[Row]:
        """A text on as many lines as it takes."""
        return [self.styled([(f" {line}", style)]) for line in wrap(text, max(10, width - 2))]


class SweepChart(PlotView):
    """The error of the numerical gradient of the selected node against h, both logarithmic."""

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
        legend = [("central", "q"), ("forward", "k")]
        title = self.title_row(size.width, f"error of the numerical d{graph.output_name}/d{name}",
                               legend)  # fmt: skip
        if graph.gradients[index] is None:
            text = f"{graph.output_name} does not depend on {name}, or {name} is a constant"
            return self.message(size, title, text)
        width = max(1, size.width - AXIS_WIDTH)
        points = self.points(max(2, 2 * width))
        central, forward = (
            np.array([value or np.nan for value in values], np.float32)
            for values in ([p.central for p in points], [p.forward for p in points])
        )
        known = np.concatenate([v[np.isfinite(v)] for v in (central, forward)])
        summary = sweep_summary(graph, index, points)
        if not len(known):
            return self.message(size, title, summary)
        scale = fit_scale(float(known.min()), float(known.max()), log=True)
        at = (math.log10(self.state.h) - SWEEP_LOW) / (SWEEP_HIGH - SWEEP_LOW)
        layers: list[Layer] = [
            Line(self.palette.k, forward),
            Line(self.palette.q, central),
        ]
        if 0 <= at <= 1:
            layers.append(Moment(self.palette.dim, round(at * (width - 1))))
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
        graph, node = self.state.graph, self.state.graph.nodes[self.state.selected]
        output = graph.output_name
        title = self.title_row(size.width, f"{node.name} <- {node.name} - lr*G", [])
        if not node.is_input:
            text = f"{node.name} is computed: choose an input with the arrow keys to move it"
            return self.message(size, title, text)
        descent = self.descent(node.name)
        if not descent.runs:
            return self.message(size, title, descent.verdict)
        markers = ASCII_RATE_MARKERS if self.glyphs.ascii else RATE_MARKERS
        lines = self.wrapped(size.width, descent.verdict)
        rates = zip(descent.runs, markers, RATE_STYLES, strict=True)
        for number, (run, marker, style) in enumerate(rates):
            end = "it is undefined" if run.left_domain else f"{output} = {short(run.outputs[-1])}"
            lines.append(self.styled([
                (f" {marker} {run.label:<9} ", style), (update_line(descent, number), "text"),
                (f"   {len(run.outputs) - 1} steps: {end}", "dim"),
            ]))  # fmt: skip
        left = Size(size.width, size.height - 1 - len(lines))
        if left.height < 4:
            return [title, *lines]
        return [title, *lines, *self._valley(left, descent, markers)]

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

"""The graph, drawn with lines between its nodes, its title, the current step as text, and the
table of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from textual.binding import Binding, BindingType
from textual.geometry import Size

from tui_trainer.learn.scalar.graph import ScalarGraph
from tui_trainer.learn.scalar.layout import Layout, layout
from tui_trainer.learn.scalar.steps import GraphStep
from tui_trainer.protocol import formatting
from tui_trainer.ui.panels.scalar_graph.state import GraphState
from tui_trainer.ui.widgets.lines import LineView, Row, ScrollingLines
from tui_trainer.ui.widgets.table import Cell, CellValue, TableColumn, VirtualTable

NORTH, SOUTH, WEST, EAST = 1, 2, 4, 8
BOX = dict(enumerate(" ╵╷│╴┘┐┤╶└┌├─┴┬┼"))
"""Line characters by the directions in which they lead."""
MAX_NAME, VALUE_WIDTH = 8, 7
MAX_GAP = 28
MAX_PITCH = 4
STEP_TEXT_ROWS = 4
SIGNS = {"neg": "-"}
"""Signs of operations that differ from their names."""


@dataclass(frozen=True)
class Geometry:
    """Where the columns and rows of a graph lie, in cells."""

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
    pitches = range(MAX_PITCH, 2, -1)
    pitch = next((p for p in pitches if graph_height(placed, p) <= size.height), 2)
    height = graph_height(placed, pitch)
    return Geometry(tuple(left), tuple(channel), node_width, pitch, x, height)


def graph_height(placed: Layout, pitch: int = MAX_PITCH) -> int:
    """Lines of a graph, with `pitch` lines from one row of nodes to the next."""
    return round((placed.rows - 1) * pitch) + 2


class GraphView(ScrollingLines, can_focus=False):
    """The nodes with their values and gradients. It follows the current step."""

    lessons = ("scalar-tensor", "gradient")

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
            self.styled(joined_spans(row, names)) for row, names in zip(texts, styles, strict=True)
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


def joined_spans(characters: Sequence[str], styles: Sequence[str]) -> list[tuple[str, str]]:
    """Join neighbouring characters of the same style into one span."""
    spans: list[tuple[str, str]] = []
    for character, style in zip(characters, styles, strict=True):
        if spans and spans[-1][1] == style:
            spans[-1] = (spans[-1][0] + character, style)
        else:
            spans.append((character, style))
    return spans


def step_title(state: GraphState, step: GraphStep) -> str:
    """`backward: dL/de = -2`"""
    if step.backward:
        return state.say("backward: {title}", title=step.title)
    return state.say("forward: {title}", title=step.title)


class StepText(LineView):
    """The current step, with the chain rule in numbers."""

    lessons = ("forward-backward",)

    DEFAULT_CSS = f"StepText {{ width: 1fr; height: {STEP_TEXT_ROWS}; }}"

    def __init__(self, state: GraphState, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.state = state

    def rows(self, size: Size) -> Sequence[Row]:
        """A title, and a line for each operand."""
        step, state = self.state.current, self.state
        if step is None:
            title = state.say("p computes the first node; space goes to the end and back")
            lines: Sequence[str] = (
                state.say("forward: every node gets its value from its operands"),
                state.say(
                    "backward: every node passes d{output}/d(node) on, times the local derivative",
                    output=state.graph.output_name,
                ),
            )
        else:
            title = step_title(state, step)
            lines = [state.translated(line) for line in step.lines]
        rows = [self.styled([(title, "title"), (f" {self._rule(size.width, title)}", "rule")])]
        return [*rows, *(self.styled([(f" {line}", "text")]) for line in lines)]

    def _rule(self, width: int, title: str) -> str:
        return self.glyphs.rule * max(0, width - len(title) - 1)


class StepList(ScrollingLines, can_focus=False):
    """All steps that were made, the newest at the end."""

    lessons = ("forward-backward",)

    DEFAULT_CSS = "StepList { width: 1fr; height: 1fr; }"

    def __init__(self, state: GraphState, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.state = state
        self._texts: list[tuple[str, str]] = []

    def show(self) -> None:
        """List the steps again, and show the newest."""
        state, self._texts = self.state, []
        for number, step in enumerate(state.steps[: state.position], 1):
            newest = number == state.position
            self._texts.append((step_title(state, step), "strong" if newest else "dim"))
            style = "text" if newest else "dim"
            self._texts += [(f"  {state.translated(line)}", style) for line in step.lines]
        self.lines_changed()
        bottom = max(0, len(self._texts) - self.view_size.height)
        self.scroll_to(0, bottom, animate=False, force=True)

    def view_resized(self) -> None:
        self.show()

    def line_count(self) -> int:
        return len(self._texts)

    def line(self, index: int) -> Row:
        return self.styled([self._texts[index]])


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


class NodeTable(VirtualTable):
    """Every node with its value and gradient, PyTorch's gradient, and the numerical one."""

    lessons = ("scalar-tensor", "gradient")

    DEFAULT_CSS = "NodeTable { width: 1fr; height: 1fr; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "activate", "Value", id="graph.edit",
                tooltip="Change the value of the selected input"),
    ]  # fmt: skip

    def __init__(self, state: GraphState, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.state = state
        self._gradients: dict[int, float] = {}
        self._values: set[int] = set()
        self._language = ""

    def _build_columns(self) -> None:
        """Build the columns, with headings in the user's language."""
        self._language, say = self.state.language, self.state.say
        self.columns = (
            TableColumn("name", say("node"), 6, self._name_of, left=True),
            TableColumn("operation", say("operation"), 0, self._operation_of, left=True),
            TableColumn("value", say("value"), 8, self._value_of),
            TableColumn("gradient", say("gradient"), 8, self._gradient_of, style="norm"),
            TableColumn("numerical", say("numerical"), 12, self._numerical_of, _nine_digits),
            TableColumn("autograd", "PyTorch", 8, self._autograd_of, style="norm"),
            TableColumn("error", say("error"), 8, self._error_of, formatting.scientific),
            TableColumn("product", say("as a product"), 22, self._product_of, left=True,
                        style="dim"),
        )  # fmt: skip

    def show(self) -> None:
        """Draw the state again."""
        if self._language != self.state.language:
            self._build_columns()
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
        operation = graph.expression.operation_text(row)
        return Cell(operation or self.state.translated(graph.nodes[row].operation), "dim")

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

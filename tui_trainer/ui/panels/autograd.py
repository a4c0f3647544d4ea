"""The autograd graph as a tree of modules, and the details of the row under the cursor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from textual.binding import Binding, BindingType

from tui_trainer.client.answers.autograd import (
    Fold,
    fold,
    gradient_text,
    lines,
    matches,
    path_to_loss,
)
from tui_trainer.protocol.autograd import AutogradGraph
from tui_trainer.protocol.formatting import bytes_, count, counted, shape_text
from tui_trainer.protocol.text import truncate_middle, wrap
from tui_trainer.ui.panels.base import title_line
from tui_trainer.ui.widgets.lines import BuiltLines, Row, Span
from tui_trainer.ui.widgets.table import Cell, TableColumn, VirtualTable

STYLES = {"loss": "title", "module": "strong", "repeat": "title", "operation": "text",
          "leaf": "accent"}  # fmt: skip
OPEN_DEPTH = 2
"""Rows above this depth are open at first."""
MAX_LISTED = 12
"""Maximum number of inputs, or of users, of a node that are listed."""
MAX_PATH = 400
MIN_NAME_WIDTH = 38

RowKey = tuple[str, str, str, float]


class GraphTable(VirtualTable):
    """A row for each module, operation and leaf that is not inside a closed module."""

    lessons = ("loss-graph", "forward-backward")

    DEFAULT_CSS = "GraphTable { width: 1fr; height: 1fr; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        *VirtualTable.BINDINGS,
        Binding("right", "open(1)", "Open", show=False, id="graph.open",
                tooltip="Open the module under the cursor"),
        Binding("left", "open(0)", "Close", show=False, id="graph.close",
                tooltip="Close the module under the cursor, or the one around it"),
    ]  # fmt: skip

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.graph: AutogradGraph | None = None
        self.repeats = True
        self.filter = ""
        self._rows_shown: list[tuple[int, Fold]] = []
        self._root: Fold | None = None
        self._toggled: set[RowKey] = set()
        """Rows that the user has opened or closed."""
        self.columns = (
            TableColumn("name", "", 0, self._name_of, left=True),
            TableColumn(
                "gradient",
                "gradient",
                9,
                self._gradient_of,
                tooltip="Norm of the gradient that arrives",
            ),
            TableColumn("shape", "shape", 14, self._shape_of, style="dim"),
            TableColumn("saved", "saved", 9, self._saved_of, style="dim"),
            TableColumn("range", "over all repeats", 20, self._range_of, style="dim"),
        )

    def show(self, graph: AutogradGraph | None) -> None:
        """Show a graph; open rows stay open."""
        self.graph = graph
        self.rebuild()

    def rebuild(self) -> None:
        """Fold the graph again, for another filter or with other repeats."""
        graph = self.graph
        folded = self.repeats and not self.filter
        self._root = fold(graph, folded) if graph is not None else None
        self._layout()

    def _layout(self) -> None:
        kept = self.selected
        self._rows_shown = []
        if self._root is not None and self.graph is not None:
            found = set(matches(self.graph, self.filter)) if self.filter else None
            self._rows_shown = self._visible(self._root, found)
        keys = [_key(row) for _, row in self._rows_shown]
        self.set_order(np.arange(len(self._rows_shown)))
        if kept is not None and _key(kept) in keys:
            self.cursor = keys.index(_key(kept))
        self.placeholder = "nothing matches" if self.filter else ""
        self.update_rows()
        self._post_highlighted()

    def _visible(self, root: Fold, found: set[int] | None) -> list[tuple[int, Fold]]:
        if found is not None:
            return _matching(root, found)
        shown = []
        waiting = [(0, root)]
        while waiting:
            depth, row = waiting.pop()
            shown.append((depth, row))
            if self._is_open(depth, row):
                waiting += [(depth + 1, child) for child in reversed(row.children)]
        return shown

    def _is_open(self, depth: int, row: Fold) -> bool:
        return (depth < OPEN_DEPTH or len(row.children) == 1) != (_key(row) in self._toggled)

    @property
    def selected(self) -> Fold | None:
        """The row under the cursor."""
        row = self.current_row
        known = row is not None and row < len(self._rows_shown)
        return self._rows_shown[row][1] if known and row is not None else None

    def row_at(self, row: int) -> Fold:
        return self._rows_shown[row][1]

    def toggle(self) -> None:
        """Open or close the row under the cursor."""
        row = self.selected
        if row is not None and row.children and not self.filter:
            self._toggled ^= {_key(row)}
            self._layout()

    def action_open(self, wanted: int) -> None:
        """Open (1) or close (0) the row under the cursor."""
        number = self.current_row
        if number is None or self.filter:
            return
        depth, row = self._rows_shown[number]
        if row.children and self._is_open(depth, row) != bool(wanted):
            self.toggle()
        elif not wanted:
            above = [n for n in range(number) if self._rows_shown[n][0] < depth]
            if above:
                self.move_cursor(above[-1])

    # ------------------------------------------------------------ cells

    def visible_columns(self, width: int) -> tuple[list[TableColumn], list[int]]:
        """The columns that leave enough room for the names, leftmost first."""
        name, *others = self.columns
        columns, left = [name], width
        for column in others:
            if left - column.width - 1 < MIN_NAME_WIDTH:
                break
            columns.append(column)
            left -= column.width + 1
        return columns, [left, *(column.width for column in columns[1:])]

    def _name_of(self, row: int) -> Cell:
        depth, each = self._rows_shown[row]
        mark = "  "
        if each.children:
            is_open = bool(self.filter) or self._is_open(depth, each)
            mark = f"{self.glyphs.unfolded if is_open else self.glyphs.folded} "
        times = f" × {each.count}" if each.count > 1 else ""
        detail = f"  {each.detail}" if each.detail and each.kind != "leaf" else ""
        return Cell(f"{'  ' * depth}{mark}{each.label}{times}{detail}", STYLES[each.kind])

    def _gradient_of(self, row: int) -> str | None:
        return gradient_text(self.row_at(row).gradient) or None

    def _shape_of(self, row: int) -> str:
        each = self.row_at(row)
        own = each.kind in ("operation", "leaf") or not each.children
        return shape_text(each.shape) if own else ""

    def _saved_of(self, row: int) -> str:
        size = self.row_at(row).saved_bytes
        return bytes_(size, 0) if size else ""

    def _range_of(self, row: int) -> str:
        each = self.row_at(row)
        small, large = each.gradients
        return (
            f"{gradient_text(small)} … {gradient_text(large)}"
            if each.count > 1 and small < large
            else ""
        )


def _matching(root: Fold, found: set[int]) -> list[tuple[int, Fold]]:
    """The rows of the nodes `found`, below the modules that contain them."""
    whole = list(lines(root))
    kept: list[tuple[int, Fold]] = []
    needed = -1
    for depth, row in reversed(whole):
        own = row.kind in ("operation", "leaf") and row.node in found
        if own or depth == needed - 1:
            kept.append((depth, row))
            needed = depth
    return list(reversed(kept)) if needed >= 0 else []


def _key(row: Fold) -> RowKey:
    return (row.kind, row.path, row.label, row.order if row.kind == "operation" else 0.0)


class NodeDetails(BuiltLines):
    """A row of the graph: what it computes, what flows through it, and its path to the loss."""

    DEFAULT_CSS = "NodeDetails { height: 1fr; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._graph: AutogradGraph | None = None
        self._row: Fold | None = None
        self._users: list[list[tuple[int, float]]] = []

    def show(self, graph: AutogradGraph | None, row: Fold | None) -> None:
        """Show a row of a graph."""
        if graph is not self._graph:
            self._users = _users(graph) if graph is not None else []
        self._graph, self._row = graph, row
        self._build()

    def _build(self) -> None:
        width = self.view_size.width
        if not self.is_attached or not width:
            return
        graph, row = self._graph, self._row
        self._built = []
        if graph is not None and row is not None:
            self._built = self._facts(row, width)
            if row.kind in ("operation", "leaf") and row.node is not None:
                self._built += self._neighbours(graph, row.node, width)
                self._built += self._path(graph, row.node, width)
            if row.kind == "loss":
                self._built += self._notes(graph, width)
        self.scroll_to(y=0, animate=False, force=True)
        self.lines_changed()

    def _pair(self, name: str, value: str) -> Row:
        return self.styled([(f"{name:<10}", "dim"), (value, "text")])

    def _facts(self, row: Fold, width: int) -> list[Row]:
        times = f" × {row.count}" if row.count > 1 else ""
        rows = [title_line(self, width, f"{row.label}{times}")]
        if row.kind in ("module", "repeat"):
            where = row.path if row.kind == "module" else row.path.rpartition(".")[0]
            if row.detail:
                rows.append(self._pair("class", row.detail))
            if where:
                rows.append(self._pair("path", truncate_middle(where, max(8, width - 10))))
        elif row.path:
            name = "name" if row.kind == "leaf" else "in"
            rows.append(self._pair(name, truncate_middle(row.path, max(8, width - 10))))
        if row.kind in ("operation", "leaf"):
            rows.append(self._pair("shape", shape_text(row.shape)))
        else:
            rows.append(self._pair("holds", counted(row.operations, "operation")))
        if row.saved_bytes:
            rows.append(self._pair("saves", f"{bytes_(row.saved_bytes, 0)} for backward"))
        if not math.isnan(row.gradient):
            rows.append(self._pair("gradient", f"{gradient_text(row.gradient)} arrives (2-norm)"))
        return rows

    def _notes(self, graph: AutogradGraph, width: int) -> list[Row]:
        rows: list[Row] = []
        if graph.saved_bytes is not None:
            held = bytes_(graph.saved_bytes, 0)
            rows.append(self._pair("memory", f"{held} in all, shared parts once"))
        for note in graph.notes:
            rows += [self.styled([(line, "warning")]) for line in wrap(note, width)]
        return rows

    def _edge(self, graph: AutogradGraph, node: int, gradient: float, width: int) -> Row:
        each = graph.nodes[node]
        value = f"{gradient_text(gradient):>9} "
        name = each.leaf or each.operation
        module = graph.modules[each.module].path
        room = max(4, width - 10)
        spans: list[Span] = [(value, "strong")]
        name = truncate_middle(name, room)
        spans.append((name, "accent" if each.leaf else "text"))
        left = room - len(name) - 2
        if module and left > 6:
            spans.append((f"  {truncate_middle(module, left)}", "dim"))
        return self.styled(spans)

    def _neighbours(self, graph: AutogradGraph, node: int, width: int) -> list[Row]:
        each = graph.nodes[node]
        rows: list[Row] = []
        inputs = list(zip(each.inputs, each.gradients, strict=True))
        for title, edges in (("Computed from", inputs), ("Used by", self._users[node])):
            if edges:
                rows += [[], title_line(self, width, title)]
                rows += [self._edge(graph, *edge, width) for edge in edges[:MAX_LISTED]]
                if len(edges) > MAX_LISTED:
                    rows.append(self.styled([(f"and {len(edges) - MAX_LISTED:,} more", "dim")]))
        return rows

    def _path(self, graph: AutogradGraph, node: int, width: int) -> list[Row]:
        if node == 0:
            return []
        found = path_to_loss(graph, node)
        several = f"1 of {count(found.paths, 0)} paths" if found.paths > 1 else "the only path"
        rows = [[], title_line(self, width, "To the loss", right=several)]
        steps = list(zip(found.nodes[1:], found.gradients, strict=True))[:MAX_PATH]
        return rows + [self._edge(graph, user, gradient, width) for user, gradient in steps]


def _users(graph: AutogradGraph) -> list[list[tuple[int, float]]]:
    found: list[list[tuple[int, float]]] = [[] for _ in graph.nodes]
    for index, node in enumerate(graph.nodes):
        for before, gradient in zip(node.inputs, node.gradients, strict=True):
            found[before].append((index, gradient))
    return found


def graph_spans(graph: AutogradGraph, wide: bool) -> Sequence[Span]:
    """Figures of a graph for a caption; `wide` adds those that the row of the loss shows too."""
    operations = sum(not node.leaf for node in graph.nodes)
    leaves = len(graph.nodes) - operations
    spans: list[Span] = [
        (counted(operations, "operation"), "text"),
        (counted(leaves, "leaf", "leaves"), "text"),
    ]
    if wide and graph.saved_bytes is not None:
        spans.append((f"{bytes_(graph.saved_bytes, 0)} saved", "text"))
    return spans

"""The table of nodes: values, gradients, PyTorch's gradients and numerical ones."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from textual.binding import Binding, BindingType

from tui_trainer.protocol import formatting
from tui_trainer.ui.panels.scalar_graph.state import GraphState
from tui_trainer.ui.widgets.table import Cell, CellValue, TableColumn, VirtualTable


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

    def _head(self) -> None:
        """The columns, with headings in the language of the learner."""
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
            self._head()
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

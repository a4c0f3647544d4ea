"""Places the nodes of a scalar graph: inputs on the left, the output on the right."""

from __future__ import annotations

from dataclasses import dataclass

from tui_trainer.learn.scalar.parser import ScalarExpression


@dataclass(frozen=True)
class Layout:
    """The place of every node, in columns and rows of nodes; a row may be fractional."""

    places: tuple[tuple[int, float], ...]
    """(column, row) of each node."""
    edges: tuple[tuple[int, int], ...]
    """(operand, node), each pair once."""
    columns: int
    rows: float
    """Row of the lowest node, plus 1."""


def layout(expression: ScalarExpression) -> Layout:
    """Place each node one column right of its rightmost operand, and each input left of the first
    node that uses it. Rows are as in a tree: a node is centred on its operands."""
    column = _columns(expression)
    row: dict[int, float] = {}
    next_row = 0

    def place(index: int) -> float:
        nonlocal next_row
        if index in row:
            return row[index]
        inputs = tuple(dict.fromkeys(expression.nodes[index].inputs))
        if inputs:
            new = [i for i in inputs if i not in row] or list(inputs)
            found = [place(i) for i in new]
            row[index] = (min(found) + max(found)) / 2
        else:
            row[index] = float(next_row)
            next_row += 1
        return row[index]

    place(expression.output)
    for index in range(len(expression.nodes)):  # nodes on which the output does not depend
        place(index)
    _separate(column, row)
    edges = [(i, n) for n, node in enumerate(expression.nodes) for i in node.inputs]
    return Layout(
        tuple((column[i], row[i]) for i in range(len(expression.nodes))),
        tuple(dict.fromkeys(edges)),
        max(column) + 1,
        max(row.values()) + 1,
    )


def _columns(expression: ScalarExpression) -> list[int]:
    column: list[int] = []
    for node in expression.nodes:
        column.append(1 + max((column[i] for i in node.inputs), default=-1))
    for index, node in enumerate(expression.nodes):
        if not node.inputs:
            users = [column[n] for n, each in enumerate(expression.nodes) if index in each.inputs]
            column[index] = min(users, default=1) - 1
    return column


def _separate(column: list[int], row: dict[int, float]) -> None:
    """Move the nodes of each column down until they are at least a row apart."""
    for number in set(column):
        lowest = -1.0
        for index in sorted((i for i in row if column[i] == number), key=lambda i: row[i]):
            row[index] = max(row[index], lowest + 1)
            lowest = row[index]

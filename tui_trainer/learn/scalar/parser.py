"""Parses expressions of scalars, such as `(a*b + c) * f` or `e = a*b; d = e + c; L = d*f`, into the
nodes of a graph in order of evaluation.

An expression is parsed with `ast` and a whitelist of its nodes; nothing is executed as Python.
"""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from tui_trainer.breakpoints.expression import ExpressionError
from tui_trainer.learn.scalar.operations import OPERATIONS
from tui_trainer.learn.scalar.translation import Message, say

MAX_CHARACTERS = 2000
MAX_NODES = 200
MAX_DEPTH = 200

BINARY: dict[type[ast.operator], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**",
}  # fmt: skip
FUNCTIONS = ("tanh", "relu", "exp", "log")
ALLOWED = say("numbers, names, {signs}", signs=f"+ - * / **, {', '.join(FUNCTIONS)}")
EXAMPLE_HINT = say("such as {example}", example='"(a*b + c) * f"')
INPUT, CONSTANT = "input", "constant"
OUTPUT_NAME = "L"
INTERMEDIATE_NAMES = "edgkmnpqrsuvz"
"""Names for intermediate results, in this order, followed by t1, t2, …"""


class GraphError(ExpressionError):
    """An expression that cannot be parsed or evaluated, with the position of the error."""


@dataclass(frozen=True)
class Node:
    """One scalar of the graph."""

    name: str
    operation: str
    """`input`, `constant`, or a key of OPERATIONS."""
    inputs: tuple[int, ...] = ()
    """Indices of the operands."""
    constant: float = 0.0
    """The value of a constant."""
    start: int = 0
    end: int = 0
    """`start` and `end` are the node's position in the text of the expression."""

    @property
    def is_input(self) -> bool:
        return self.operation == INPUT

    @property
    def is_computed(self) -> bool:
        return self.operation in OPERATIONS


@dataclass(frozen=True)
class ScalarExpression:
    """A parsed expression: its nodes, each after its operands."""

    text: str
    nodes: tuple[Node, ...]
    output: int
    """Index of the node that is differentiated."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names that need a value, in the order in which they appear."""
        return tuple(node.name for node in self.nodes if node.is_input)

    def index(self, name: str) -> int | None:
        """The index of the node called `name`; None if there is none."""
        return next((i for i, node in enumerate(self.nodes) if node.name == name), None)

    def operation_text(self, index: int) -> str:
        """`a*b`, `tanh(n)`; "" for inputs and constants."""
        node = self.nodes[index]
        if not node.is_computed:
            return ""
        return OPERATIONS[node.operation].text(*map(self.label, node.inputs))

    def label(self, index: int) -> str:
        """The name of a node inside a formula: `a`, `2`, `(-2)`."""
        name = self.nodes[index].name
        return f"({name})" if name.startswith("-") else name

    def check_values(self, values: Mapping[str, float]) -> None:
        """Raise GraphError unless exactly the inputs have values, all of them finite."""
        inputs = self.inputs
        for name, value in values.items():
            if name not in inputs:
                if self.index(name) is not None:
                    raise self._error(
                        say("{name} is computed, so it cannot be given", name=name),
                        name,
                        say("only {names} can be given", names=", ".join(inputs)),
                    )
                message = say("there is no {name} in the expression", name=name)
                raise GraphError(message, self.text, 0, 0, _similar(name, inputs))
            if not math.isfinite(value):
                raise self._error(
                    say("{name} is {value}", name=name, value=value),
                    name,
                    say("give a finite number"),
                )
        missing = [name for name in inputs if name not in values]
        if missing:
            names = ", ".join(missing)
            one = say("{names} has no value", names=names)
            raise self._error(
                one if len(missing) == 1 else say("{names} have no value", names=names),
                missing[0],
                f"--at {' '.join(f'{name}=1' for name in missing)}",
            )

    def _error(self, message: Message, name: str, hint: str) -> GraphError:
        node = self.nodes[cast(int, self.index(name))]
        return GraphError(message, self.text, node.start, node.end, hint)


def parse(text: str) -> ScalarExpression:
    """Parse an expression. Raises GraphError."""
    return _Parser(" ".join(text.split())).parse()


class _Parser:
    """Turns the syntax tree of an expression into nodes."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._bytes = text.encode()
        self._nodes: list[Node] = []
        self._by_name: dict[str, int] = {}
        self._unnamed: list[int] = []

    def parse(self) -> ScalarExpression:
        if not self._text:
            raise GraphError(say("the expression is empty"), "", 0, 0, EXAMPLE_HINT)
        if len(self._text) > MAX_CHARACTERS:
            message = say("the expression is longer than {count} characters", count=MAX_CHARACTERS)
            raise GraphError(message, "", 0, 0)
        statements = self._statements()
        output = -1
        for number, statement in enumerate(statements):
            last = number == len(statements) - 1
            match statement:
                case ast.Assign(targets=[ast.Name(id=name) as target], value=value):
                    output = self._assignment(target, name, value)
                case ast.Expr(value=value) if last:
                    output = self._node(value, 0)
                case ast.Expr():
                    raise self._error(
                        say("only the last part may be without a name"),
                        statement,
                        say("such as {example}", example="e = a*b; e + c"),
                    )
                case _:
                    raise self._error(say("this is not supported"), statement, ALLOWED)
        if not any(node.is_input for node in self._nodes):
            message = say("there is no name in the expression, so nothing to differentiate")
            raise GraphError(message, self._text, 0, len(self._text), EXAMPLE_HINT)
        self._name_intermediates(output)
        return ScalarExpression(self._text, tuple(self._nodes), output)

    def _statements(self) -> list[ast.stmt]:
        try:
            tree = ast.parse(self._text, mode="exec")
        except SyntaxError as error:
            raise self._syntax_error(error) from None
        except (ValueError, RecursionError, MemoryError):
            raise GraphError(say("this cannot be parsed"), self._text, 0, 0, ALLOWED) from None
        if not tree.body:
            raise GraphError(say("the expression is empty"), self._text, 0, 0)
        return tree.body

    def _syntax_error(self, error: SyntaxError) -> GraphError:
        text = self._text
        start = max(0, (error.offset or 1) - 1)
        hint: str = ""
        if text.count("(") != text.count(")"):
            hint = say("a parenthesis is missing")
        elif missing := re.search(r"(?<![\w.])\d+(?:\.\d*)?(?=[A-Za-z_])|\)(?=\s*[\w(])", text):
            hint, start = say("write * between two factors"), missing.end()
        elif re.search(r"\b[A-Za-z_]\w*\s+[A-Za-z_(\d]", text):
            hint = say("write * between two factors")
        message = say("this is not a valid expression")
        return GraphError(message, text, start, start + 1, hint)

    # ------------------------------------------------------------ nodes

    def _assignment(self, target: ast.Name, name: str, value: ast.expr) -> int:
        if name in self._by_name:
            known = self._nodes[self._by_name[name]]
            used = say("{name} is already used", name=name)
            message = used if known.is_input else say("{name} is assigned twice", name=name)
            raise self._error(message, target, say("give every result a name of its own"))
        if name in FUNCTIONS:
            raise self._error(
                say("{name} is a function", name=name), target, say("choose another name")
            )
        index = self._node(value, 0)
        node = self._nodes[index]
        if not node.is_computed or index not in self._unnamed:
            raise self._error(
                say("{name} would be a second name of {first}", name=name, first=node.name),
                value,
                say("assign the result of an operation"),
            )
        if name in self._by_name:
            raise self._error(say("{name} is used before it has a value", name=name), target)
        self._unnamed.remove(index)
        start, _ = self._place(target)
        self._nodes[index] = Node(name, node.operation, node.inputs, 0.0, start, node.end)
        self._by_name[name] = index
        return index

    def _node(self, node: ast.expr, depth: int) -> int:
        """Add a node after its operands; returns its index."""
        if depth > MAX_DEPTH:
            raise self._error(say("this is nested too deeply"), node)
        match node:
            case ast.Constant(value=value) if type(value) in (int, float):
                return self._constant(node, cast(float, value))
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if type(value) in (
                int,
                float,
            ):
                return self._constant(node, -cast(float, value))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._computed("neg", node, self._node(operand, depth + 1))
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self._node(operand, depth + 1)
            case ast.Name(id=name):
                return self._name(node, name)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
                operands = self._node(left, depth + 1), self._node(right, depth + 1)
                return self._computed(BINARY[type(op)], node, *operands)
            case ast.BinOp(op=ast.BitXor()):
                raise self._error(say("^ is not a power here"), node, say("write ** for a power"))
            case ast.Call():
                return self._call(node, depth)
        raise self._error(say("this is not supported"), node, ALLOWED)

    def _call(self, node: ast.Call, depth: int) -> int:
        if not isinstance(node.func, ast.Name):
            raise self._error(say("this is not a function"), node.func, ALLOWED)
        name = node.func.id
        if name not in FUNCTIONS:
            known = {"sqrt": "x**0.5", "pow": "a**b"}
            hint = _similar(name, FUNCTIONS)
            if name in known:
                hint = say("write {formula}", formula=known[name])
            if name in self._by_name:
                hint = say("write {name} * (…) for a product", name=name)
            raise self._error(say("there is no function {name}", name=name), node.func, hint)
        if len(node.args) != 1 or node.keywords or isinstance(node.args[0], ast.Starred):
            raise self._error(
                say("{name} takes one value", name=name),
                node,
                say("such as {example}", example=f"{name}(a)"),
            )
        return self._computed(name, node, self._node(node.args[0], depth + 1))

    def _name(self, node: ast.Name, name: str) -> int:
        if name in FUNCTIONS:
            raise self._error(
                say("{name} is a function", name=name),
                node,
                say("such as {example}", example=f"{name}(a)"),
            )
        if name not in self._by_name:
            self._by_name[name] = self._add(node, Node(name, INPUT))
        return self._by_name[name]

    def _constant(self, node: ast.expr, value: float) -> int:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self._error(say("this number is too large"), node)
        return self._add(node, Node(f"{number:g}", CONSTANT, constant=number))

    def _computed(self, operation: str, node: ast.expr, *inputs: int) -> int:
        index = self._add(node, Node("", operation, inputs))
        self._unnamed.append(index)
        return index

    def _add(self, place: ast.expr, node: Node) -> int:
        if len(self._nodes) >= MAX_NODES:
            message = say("the graph would have more than {count} nodes", count=MAX_NODES)
            raise self._error(message, place)
        start, end = self._place(place)
        self._nodes.append(Node(node.name, node.operation, node.inputs, node.constant, start, end))
        return len(self._nodes) - 1

    def _name_intermediates(self, output: int) -> None:
        """Name the unnamed nodes: the output L, the others e, d, g, … in order of evaluation."""
        taken = set(self._by_name)
        if output in self._unnamed and OUTPUT_NAME not in taken:
            self._rename(output, OUTPUT_NAME)
        pool = [letter for letter in INTERMEDIATE_NAMES if letter not in taken]
        pool += [f"t{n}" for n in range(1, MAX_NODES + 1) if f"t{n}" not in taken]
        for index, name in zip(tuple(self._unnamed), pool, strict=False):
            self._rename(index, name)

    def _rename(self, index: int, name: str) -> None:
        node = self._nodes[index]
        self._nodes[index] = Node(name, node.operation, node.inputs, 0.0, node.start, node.end)
        self._unnamed.remove(index)

    # ------------------------------------------------------------ errors

    def _place(self, node: ast.AST) -> tuple[int, int]:
        """(start, end) of a node in characters, from ast's offsets in UTF-8 bytes."""
        start, end = getattr(node, "col_offset", 0), getattr(node, "end_col_offset", None)
        stop = len(self._bytes) if end is None else end
        return (
            len(self._bytes[:start].decode(errors="ignore")),
            len(self._bytes[:stop].decode(errors="ignore")),
        )

    def _error(self, message: Message, node: ast.AST, hint: str = "") -> GraphError:
        return GraphError(message, self._text, *self._place(node), hint)


def _similar(name: str, known: Sequence[str]) -> Message:
    """A hint for a name that is unknown."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return say("did you mean {name}?", name=close[0])
    return say("choose from {names}", names=", ".join(known))


def parse_values(given: Sequence[str]) -> dict[str, float]:
    """`["a=2", "b=-3"]` as numbers by name. Raises GraphError."""
    values: dict[str, float] = {}
    text = " ".join(given)
    at = 0
    for part in given:
        name, equals, number = part.partition("=")
        name, number, end = name.strip(), number.strip(), at + len(part)
        if not equals or not name.isidentifier():
            message = say("{given} is not a value", given=part)
            raise GraphError(
                message, text, at, end, say("such as {example}", example="--at a=2 b=-3")
            )
        if name in values:
            raise GraphError(say("{name} is given twice", name=name), text, at, end)
        try:
            values[name] = float(number)
        except ValueError:
            message = say("{given} is not a number", given=number or say("nothing"))
            hint = say("such as {example}", example=f"--at {name}=2")
            raise GraphError(message, text, end - len(number), end, hint) from None
        at = end + 1
    return values


@dataclass(frozen=True)
class Example:
    """A built-in expression."""

    name: str
    title: str
    text: str
    values: Mapping[str, float]
    raise_: str
    """The input to move first in gradient descent."""


EXAMPLES = (
    Example(
        "chain",
        "the chain rule",
        "e = a*b; d = e + c; L = d*f",
        {"a": 2.0, "b": -3.0, "c": 10.0, "f": -2.0},
        "a",
    ),
    Example(
        "weight",
        "one weight and a squared error",
        "p = w*x; d = p - y; L = d**2",
        {"w": 0.5, "x": 1.5, "y": 3.0},
        "w",
    ),
    Example(
        "neuron",
        "a neuron",
        "p1 = w1*x1; p2 = w2*x2; s = p1 + p2; n = s + b; o = tanh(n)",
        {"w1": -3.0, "x1": 2.0, "w2": 1.0, "x2": 0.0, "b": 6.881373587019543},
        "w1",
    ),
    Example(
        "net",
        "a net of two layers with a squared error",
        "n1 = w1*x1 + w2*x2 + b1; h1 = tanh(n1); n2 = w3*x1 + w4*x2 + b2; h2 = tanh(n2); "
        "o = v1*h1 + v2*h2 + c; d = o - y; L = d**2",
        {
            "x1": 1.0, "x2": -0.5, "w1": 0.6, "w2": -0.4, "b1": 0.1, "w3": -0.3, "w4": 0.8,
            "b2": 0.0, "v1": 0.7, "v2": 0.5, "c": 0.2, "y": -1.0,
        },
        "v1",
    ),
)  # fmt: skip

"""A scalar graph with values: forward and backward one node at a time, numerical derivatives, and
steps of gradient descent.

Reverse-mode differentiation as in PyTorch: the gradient of the output is 1, and each node, in the
reverse order of evaluation, adds (its gradient × the local derivative) to each of its operands.
All numbers are float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tui_trainer.learn.scalar.operations import OPERATIONS, DomainError
from tui_trainer.learn.scalar.parser import GraphError, Node, ScalarExpression, parse
from tui_trainer.learn.scalar.translation import Message, say

DEFAULT_H = 1e-4
Difference = Literal["central", "forward"]


@dataclass(frozen=True)
class GradientContribution:
    """The term that one node adds to the gradient of one of its operands."""

    to: int
    """Index of the operand."""
    local: float
    """The derivative of the node with respect to the operand."""
    formula: str
    """The local derivative with names: `b`."""
    amount: float
    """The gradient of the node × `local`."""
    total: float
    """The gradient of the operand after this term was added."""
    first: bool
    """Whether this is the first term that the operand receives."""

    @property
    def formula_alone(self) -> str:
        """`formula` without the parentheses that are needed inside a product."""
        inner = self.formula[1:-1]
        wrapped = self.formula == f"({inner})" and "(" not in inner
        return inner if wrapped else self.formula


@dataclass(frozen=True)
class BackwardStep:
    """One node of the backward pass: its gradient is complete and is passed to its operands."""

    node: int
    gradient: float
    contributions: tuple[GradientContribution, ...] = ()


@dataclass(frozen=True)
class ScalarGraph:
    """An expression evaluated at a point, with the gradient of its output."""

    expression: ScalarExpression
    inputs: Mapping[str, float]
    values: tuple[float, ...]
    """Value of each node."""
    gradients: tuple[float | None, ...]
    """Gradient of the output with respect to each node; None where the output does not depend on
    it, or where it is a constant."""
    backward: tuple[BackwardStep, ...]
    """The steps of the backward pass, the output's first."""
    formulas: tuple[str, ...] = field(repr=False)
    """Each gradient as a product of local derivatives: `f*b`; "" where there is none."""

    @staticmethod
    def at(expression: ScalarExpression, values: Mapping[str, float]) -> ScalarGraph:
        """Evaluate an expression. Raises GraphError."""
        expression.check_values(values)
        computed = evaluate(expression, values)
        gradients, steps = _backward(expression, computed)
        return ScalarGraph(expression, dict(values), computed, gradients, steps,
                           _formulas(expression, steps))  # fmt: skip

    @staticmethod
    def of(text: str, values: Mapping[str, float]) -> ScalarGraph:
        """Parse and evaluate. Raises GraphError."""
        return ScalarGraph.at(parse(text), values)

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self.expression.nodes

    @property
    def output(self) -> int:
        return self.expression.output

    @property
    def output_name(self) -> str:
        return self.nodes[self.output].name

    def with_value(self, name: str, value: float) -> ScalarGraph:
        """The graph with another value of an input. Raises GraphError."""
        return ScalarGraph.at(self.expression, {**self.inputs, name: value})

    def numerical(
        self, index: int, h: float = DEFAULT_H, difference: Difference = "central"
    ) -> float | None:
        """(L(x + h) − L(x − h)) / 2h, or (L(x + h) − L(x)) / h, where x is the value of a node and
        everything computed from it is evaluated again. None where L is undefined, and for
        constants."""
        if self.gradients[index] is None:
            return None
        try:
            above = self._output_at(index, self.values[index] + h)
            if difference == "forward":
                return (above - self.values[self.output]) / h
            return (above - self._output_at(index, self.values[index] - h)) / (2 * h)
        except GraphError:
            return None

    def _output_at(self, index: int, value: float) -> float:
        """The output with one node changed."""
        return evaluate(self.expression, self.inputs, {index: value})[self.output]

    def largest_near(self, index: int, h: float) -> float:
        """The largest |value| of a node with one node changed by ±h, at least 1: the rounding of
        the output is a small multiple of float64's precision times this. Raises GraphError."""
        at = self.values[index]
        return max(
            1.0,
            *(
                abs(value)
                for changed in (at - h, at + h)
                for value in evaluate(self.expression, self.inputs, {index: changed})
            ),
        )

    def output_with(self, name: str, value: float) -> float | None:
        """The output at another value of an input; None where it is undefined."""
        try:
            return evaluate(self.expression, {**self.inputs, name: value})[self.output]
        except GraphError:
            return None


def evaluate(
    expression: ScalarExpression,
    values: Mapping[str, float],
    changed: Mapping[int, float] | None = None,
) -> tuple[float, ...]:
    """The value of every node; the nodes in `changed` have the values given there. Raises
    GraphError where an operation has no real, finite result."""
    computed: list[float] = []
    for index, node in enumerate(expression.nodes):
        if changed and index in changed:
            value = changed[index]
        elif node.is_input:
            value = values[node.name]
        elif not node.is_computed:
            value = node.constant
        else:
            value = _value(expression, index, [computed[i] for i in node.inputs])
        computed.append(value)
    return tuple(computed)


def _value(expression: ScalarExpression, index: int, operands: list[float]) -> float:
    node = expression.nodes[index]
    try:
        value = OPERATIONS[node.operation].value(*operands)
    except DomainError as error:
        raise _undefined(expression, index, error.message, operands) from None
    if not math.isfinite(value):
        what = say("{formula} is too large for a float64", formula=node.name)
        raise _undefined(expression, index, what, operands)
    return value


def _undefined(
    expression: ScalarExpression, index: int, message: Message, operands: list[float]
) -> GraphError:
    node = expression.nodes[index]
    pairs = zip(node.inputs, operands, strict=True)
    named = [
        f"{expression.operation_text(i) or expression.nodes[i].name} = {value:.6g}"
        for i, value in pairs
        if expression.nodes[i].operation != "constant"
    ]
    hint = say("there {values}", values=", ".join(named)) if named else ""
    return GraphError(message, expression.text, node.start, node.end, hint)


def _backward(
    expression: ScalarExpression, values: tuple[float, ...]
) -> tuple[tuple[float | None, ...], tuple[BackwardStep, ...]]:
    """(gradients of the nodes, steps of the backward pass)."""
    needed = _depends_on_inputs(expression)
    gradients: dict[int, float] = {}
    steps = []
    if needed[expression.output]:
        gradients[expression.output] = 1.0
    for index in reversed(range(len(values))):
        node, gradient = expression.nodes[index], gradients.get(index)
        if gradient is None or not node.is_computed:
            continue
        operation = OPERATIONS[node.operation]
        operands = [values[i] for i in node.inputs]
        locals_ = operation.derivatives(*operands, values[index])
        names = [expression.label(i) for i in node.inputs]
        formulas = operation.formulas(*names, node.name)
        contributions = []
        passes = operation.passes(*operands)
        for to, local, formula, passed in zip(node.inputs, locals_, formulas, passes, strict=True):
            if needed[to]:
                amount = gradient * local if passed else 0.0
                first = to not in gradients
                gradients[to] = total = amount if first else gradients[to] + amount
                contributions.append(GradientContribution(to, local, formula, amount, total, first))
        steps.append(BackwardStep(index, gradient, tuple(contributions)))
    return tuple(gradients.get(i) for i in range(len(values))), tuple(steps)


def _depends_on_inputs(expression: ScalarExpression) -> list[bool]:
    needed: list[bool] = []
    for node in expression.nodes:
        needed.append(node.is_input or any(needed[i] for i in node.inputs))
    return needed


MAX_FORMULA = 32
"""Characters of a formula above which another one refers to its gradient by name:
`dL/dn*(1 - o**2)`."""


def _formulas(expression: ScalarExpression, steps: tuple[BackwardStep, ...]) -> tuple[str, ...]:
    """The gradient of every node as a product of local derivatives, without factors of 1 except at
    the end."""
    output = expression.nodes[expression.output].name
    terms: dict[int, list[str]] = {expression.output: ["1"]}
    done: dict[int, str] = {}
    for step in steps:
        done[step.node] = text = " + ".join(terms[step.node])
        if len(text) > MAX_FORMULA:
            text = f"d{output}/d{expression.nodes[step.node].name}"
        elif len(terms[step.node]) > 1:
            text = f"({text})"
        upstream = text.removesuffix("*1")
        for each in step.contributions:
            product = each.formula if upstream == "1" else f"{upstream}*{each.formula}"
            terms.setdefault(each.to, []).append(product)
    for index, parts in terms.items():
        done.setdefault(index, " + ".join(parts))
    return tuple(_shortened(done.get(index, ""), output) for index in range(len(expression.nodes)))


def _shortened(text: str, output: str) -> str:
    return text if len(text) <= 2 * MAX_FORMULA else f"{text[: 2 * MAX_FORMULA - 3]}..."


# ---------------------------------------------------------------- the error of numerical gradients


@dataclass(frozen=True)
class SweepPoint:
    """The error of a numerical derivative at one h; None where it is undefined."""

    h: float
    central: float | None
    forward: float | None


SWEEP_LOW, SWEEP_HIGH = -15.0, 0.0
"""The exponents of 10 between which h is swept."""
NEVER_AGREES = 1e-3
ROUNDING = 1e-13
"""Errors below this / h, relative to the largest value of a node, are rounding alone."""


def sweep(graph: ScalarGraph, index: int, points: int = 61) -> list[SweepPoint]:
    """The error of a node's numerical gradient for h from 1e-15 to 1, evenly spaced on a
    logarithmic axis. The truncation error is proportional to h for the forward difference and to h²
    for the central one; the rounding error of both is proportional to 1/h."""
    gradient = graph.gradients[index]

    def error(h: float, difference: Difference) -> float | None:
        found = graph.numerical(index, h, difference)
        return None if found is None or gradient is None else abs(found - gradient)

    span = SWEEP_HIGH - SWEEP_LOW
    hs = [10 ** (SWEEP_LOW + span * n / (points - 1)) for n in range(points)]
    return [SweepPoint(h, error(h, "central"), error(h, "forward")) for h in hs]


def sweep_summary(graph: ScalarGraph, index: int, points: Sequence[SweepPoint]) -> Message:
    """Text about the h with the smallest error, and why the error grows on both sides of it."""
    name, output = graph.nodes[index].name, graph.output_name
    known = [(point.central, point.h) for point in points if point.central is not None]
    if not known:
        return say("the numerical gradient of {name} is undefined at every h", name=name)
    least, best = min(known, key=lambda point: (point[0], -point[1]))
    if least > NEVER_AGREES * max(1.0, abs(graph.gradients[index] or 0.0)):
        return say(
            "they never agree: {output} has a kink at this {name}, and no derivative there",
            output=output,
            name=name,
        )
    if all(error * h <= ROUNDING * graph.largest_near(index, h) for error, h in known):
        return say(
            "only rounding: {output} is at most quadratic in {name}, so nothing is truncated",
            output=output,
            name=name,
        )
    return say("best near h = {h:.0e}: left of it rounding, right of it truncation", h=best)


# ---------------------------------------------------------------- gradient descent


@dataclass(frozen=True)
class DescentRun:
    """Steps W ← W − lr·G of one input with one learning rate."""

    label: str
    """`too small`, `right`, `too large`."""
    learning_rate: float
    weights: tuple[float, ...]
    """W before the first step, then after each step."""
    gradients: tuple[float, ...]
    """dL/dW at each of the weights."""
    outputs: tuple[float, ...]
    """L at each of the weights."""
    left_domain: bool = False
    """Whether the run ended early because the next weight is too large, or the expression is
    undefined there."""


@dataclass(frozen=True)
class Descent:
    """Gradient descent on one input with three learning rates."""

    name: str
    runs: tuple[DescentRun, ...]
    verdict: Message
    """Text about the direction of the steps, and what limits their size."""


DESCENT_STEPS = 8
RATES = tuple(10 ** (exponent / 8) for exponent in range(-32, 25))
"""Learning rates that are tried, 1e-4 to 1e3."""
TOO_SMALL = 1 / 20
"""The rate that is too small, as a share of the right one."""
DIVERGED = 1e12


def descend(
    graph: ScalarGraph, name: str, label: str, learning_rate: float, steps: int = DESCENT_STEPS
) -> DescentRun:
    """Make `steps` steps W ← W − lr·G."""
    index = graph.expression.index(name)
    assert index is not None
    weights, gradients, outputs = [], [], []
    left, current = False, graph
    for number in range(steps + 1):
        gradient = current.gradients[index] or 0.0
        weights.append(current.inputs[name])
        gradients.append(gradient)
        outputs.append(current.values[graph.output])
        weight = weights[-1] - learning_rate * gradient
        if number == steps:
            break
        if not math.isfinite(weight) or abs(weight) > DIVERGED:
            left = True
            break
        try:
            current = current.with_value(name, weight)
        except GraphError:
            left = True
            break
    return DescentRun(label, learning_rate, tuple(weights), tuple(gradients), tuple(outputs), left)


def three_rates(graph: ScalarGraph, name: str) -> Descent:
    """Descent on an input with a learning rate that is too small, right, and too large."""
    index = graph.expression.index(name)
    gradient = graph.gradients[index] if index is not None else None
    output = graph.output_name
    if not gradient:
        still = say(
            "d{output}/d{name} is 0 here: no step of any size moves {name}",
            output=output,
            name=name,
        )
        return Descent(name, (), still)
    tried = [descend(graph, name, "", rate) for rate in RATES]
    reached = [
        math.inf if run.left_domain or not math.isfinite(run.outputs[-1]) else run.outputs[-1]
        for run in tried
    ]
    best = min(range(len(RATES)), key=lambda number: reached[number])
    start = graph.values[graph.output]
    too_large = next(
        (n for n in range(best + 1, len(RATES)) if reached[n] > start + abs(start) * 1e-9), None
    )
    slope = f"d{output}/d{name} = {gradient:.4g}"
    down = say("{slope}: {output} falls as {name} goes down", slope=slope, output=output, name=name)
    up = say("{slope}: {output} falls as {name} goes up", slope=slope, output=output, name=name)
    way = down if gradient > 0 else up
    if math.isinf(reached[best]):
        return Descent(name, (), say("{way}; every rate leaves what is defined", way=way))
    if abs(start - reached[best]) <= abs(start) * 1e-9:
        flat = say(
            "{way}, but so little that no rate up to {largest:g} shows it",
            way=way,
            largest=RATES[-1],
        )
        return Descent(name, (), flat)
    if too_large is None:
        rates = (RATES[16], RATES[24], RATES[32])  # 0.01, 0.1, 1
        runs = tuple(
            descend(graph, name, label, rate)
            for label, rate in zip(("small", "larger", "largest"), rates, strict=True)
        )
        endless = say("{way}; no rate up to {largest:g} is too large", way=way, largest=RATES[-1])
        return Descent(name, runs, endless)
    labelled = (
        ("too small", RATES[best] * TOO_SMALL),
        ("right", RATES[best]),
        ("too large", RATES[too_large]),
    )
    runs = tuple(descend(graph, name, label, rate) for label, rate in labelled)
    return Descent(name, runs, say("{way}, by lr times that a step", way=way))

"""Describes the forward and backward steps of a scalar graph as text."""

from __future__ import annotations

from dataclasses import dataclass

from tui_trainer.learn.scalar.graph import BackwardStep, Descent, GradientContribution, ScalarGraph
from tui_trainer.learn.scalar.operations import OPERATIONS
from tui_trainer.learn.scalar.parser import FUNCTIONS
from tui_trainer.learn.scalar.translation import say
from tui_trainer.protocol.formatting import short


def factor(value: float) -> str:
    """Like `short`, in parentheses where a sign would follow an operator."""
    text = short(value)
    return f"({text})" if text.startswith("-") else text


@dataclass(frozen=True)
class GraphStep:
    """One step through a graph: a node gets its value, or passes its gradient to its operands."""

    node: int
    backward: bool
    title: str
    lines: tuple[str, ...]


def steps_of(graph: ScalarGraph) -> list[GraphStep]:
    """Forward through every operation, then backward through every operation."""
    forward = [
        GraphStep(index, False, f"{node.name} = {_operation(graph, index)}",
                  (_forward_line(graph, index), *_local_lines(graph, index)))
        for index, node in enumerate(graph.nodes)
        if node.is_computed
    ]  # fmt: skip
    return forward + [backward_step(graph, step) for step in graph.backward]


def backward_step(graph: ScalarGraph, step: BackwardStep) -> GraphStep:
    """One backward step with the chain rule in numbers."""
    name, output = graph.nodes[step.node].name, graph.output_name
    lines = [chain_line(graph, step, each) for each in step.contributions]
    title = f"d{output}/d{name} = {short(step.gradient)}"
    if step.node == graph.output:
        title = f"d{output}/d{output} = 1"
    return GraphStep(step.node, True, title, tuple(lines))


def chain_line(graph: ScalarGraph, step: BackwardStep, each: GradientContribution) -> str:
    """`dL/da = dL/de * de/da = dL/de * b = -2 * (-3) = 6`"""
    output, name, to = graph.output_name, graph.nodes[step.node].name, graph.nodes[each.to].name
    parts = [f"d{output}/d{to}"]
    if step.node == graph.output:
        parts += [each.formula_alone, short(each.amount)]
    else:
        upstream = f"d{output}/d{name}"
        parts += [
            f"{upstream} * d{name}/d{to}",
            f"{upstream} * {each.formula}",
            f"{short(step.gradient)} * {factor(each.local)}",
            short(each.amount),
        ]
    parts = list(dict.fromkeys(parts))
    if each.first:
        return " = ".join(parts)
    sum_ = f"{parts[0]} += {' = '.join(parts[1:])}"
    return say("{sum}, now {total}", sum=sum_, total=short(each.total))


def _operation(graph: ScalarGraph, index: int) -> str:
    return graph.expression.operation_text(index)


def _forward_line(graph: ScalarGraph, index: int) -> str:
    """`e = a*b = 2*(-3) = -6`"""
    node = graph.nodes[index]
    write = short if node.operation in FUNCTIONS else factor
    numbers = [write(graph.values[i]) for i in node.inputs]
    if node.operation != "neg" and node.operation not in FUNCTIONS:
        numbers[0] = short(graph.values[node.inputs[0]]) if node.operation != "**" else numbers[0]
    with_numbers = OPERATIONS[node.operation].text(*numbers)
    return (
        f"{node.name} = {_operation(graph, index)} = {with_numbers} = {short(graph.values[index])}"
    )


def _local_lines(graph: ScalarGraph, index: int) -> list[str]:
    """`de/da = b = -3`, for each operand that has a gradient."""
    name = graph.nodes[index].name
    contributions = next((s.contributions for s in graph.backward if s.node == index), ())
    return [
        " = ".join(dict.fromkeys((f"d{name}/d{graph.nodes[each.to].name}", local_text(each))))
        for each in contributions
    ]


def local_text(each: GradientContribution) -> str:
    """The local derivative with names and as a number: `b = -3`, `1`."""
    return " = ".join(dict.fromkeys((each.formula_alone, short(each.local))))


def update_line(descent: Descent, number: int) -> str:
    """`w - lr*G` of the first step in numbers: `0.5 - 0.237*(-6.75) = 2.1006`"""
    run = descent.runs[number]
    weight, gradient, rate = run.weights[0], run.gradients[0], run.learning_rate
    after = short(weight - rate * gradient)
    return f"{short(weight)} - {rate:.3g}*{factor(gradient)} = {after}"

"""Gradients of random expressions are PyTorch's. `make oracle` tries thousands of them."""

from __future__ import annotations

import math
import os

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tui_trainer.learn.scalar.graph import ScalarGraph
from tui_trainer.learn.scalar.parser import GraphError
from tui_trainer.learn.scalar.torch_worker import autograd

EXPRESSIONS = int(os.environ.get("TUI_TRAINER_SCALAR_EXPRESSIONS", "200"))
NAMES = "abcxy"
LARGEST = 1e4


def operations(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    binary = st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "**"]), inner)
    function = st.tuples(st.sampled_from(["tanh", "relu", "exp", "log", "-"]), inner)
    power = st.tuples(inner, st.sampled_from(["2", "3", "0.5", "-1", "0", "1"]))
    return st.one_of(
        binary.map(lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"),
        function.map(lambda parts: f"{parts[0]}({parts[1]})"),
        power.map(lambda parts: f"({parts[0]})**{parts[1]}"),
    )


EXPRESSION = st.recursive(
    st.sampled_from([*NAMES, *NAMES, "2", "0.5"]), operations, max_leaves=12
).filter(lambda text: any(name in text for name in NAMES))
VALUES = st.fixed_dictionaries({name: st.integers(-12, 12).map(lambda n: n / 4) for name in NAMES})


def rounding_scale(graph: ScalarGraph) -> list[float]:
    """How large the terms were that each gradient is a sum of."""
    scale = [0.0] * len(graph.nodes)
    scale[graph.output] = 1.0
    for step in graph.backward:
        for each in step.contributions:
            term = abs(each.local) * scale[step.node]
            scale[each.to] += term if math.isfinite(term) else 0.0
    return scale


@settings(max_examples=examples(EXPRESSIONS))
@given(EXPRESSION, VALUES)
def test_gradients_are_those_of_pytorch(text, values):
    try:
        graph = ScalarGraph.of(text, {n: v for n, v in values.items() if n in text.replace(
            "exp", "").replace("tanh", "")})  # fmt: skip
    except GraphError:
        assume(False)
    # Differences in the last digit of large values would be seen after their cancellation.
    assume(all(value == 0 or 1 / LARGEST < abs(value) < LARGEST for value in graph.values))
    expected = autograd(graph.expression, graph.inputs)
    scale = rounding_scale(graph)
    for node, ours, theirs, size in zip(graph.nodes, graph.gradients, expected, scale, strict=True):
        if node.operation == "constant":
            continue
        what = f"{text} at {values}: {node.name}"
        if theirs is None or ours is None:
            assert not ours, what
            assert not theirs, what
        elif math.isnan(theirs) or math.isinf(theirs):
            assert math.isnan(ours) == math.isnan(theirs), what
            assert math.isnan(ours) or ours == theirs, what
        else:
            assert abs(ours - theirs) <= 1e-9 * max(size, abs(theirs)), what


def test_the_chain_of_the_lesson():
    graph = ScalarGraph.of("(a*b + c) * f", {"a": 2, "b": -3, "c": 10, "f": -2})
    assert autograd(graph.expression, graph.inputs) == list(graph.gradients)

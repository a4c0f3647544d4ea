"""Scalar graphs: parsing, values, gradients, numerical gradients, descent, text and SVG."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from tui_trainer.learn.scalar.graph import ScalarGraph, sweep, sweep_summary, three_rates
from tui_trainer.learn.scalar.layout import layout
from tui_trainer.learn.scalar.parser import EXAMPLES, MAX_NODES, GraphError, parse, parse_values
from tui_trainer.learn.scalar.steps import steps_of
from tui_trainer.learn.scalar.svg import svg

AT = {"a": 2.0, "b": -3.0, "c": 10.0, "f": -2.0}


def example(name: str) -> ScalarGraph:
    found = next(each for each in EXAMPLES if each.name == name)
    return ScalarGraph.of(found.text, found.values)


def by_name(graph: ScalarGraph, values: object) -> dict[str, object]:
    return dict(zip((node.name for node in graph.nodes), values, strict=True))  # type: ignore[call-overload]


@pytest.mark.parametrize("text", ["(a*b + c) * f", "e = a*b; d = e + c; L = d*f"])
def test_the_graph_of_the_lesson(text):
    graph = ScalarGraph.of(text, AT)
    assert by_name(graph, graph.values) == {**AT, "e": -6, "d": 4, "L": -8}
    gradients = {"a": 6, "b": -4, "c": -2, "f": 4, "e": -2, "d": -2, "L": 1}
    assert by_name(graph, graph.gradients) == gradients
    assert by_name(graph, graph.formulas) == {
        "L": "1", "d": "f", "f": "d", "e": "f*1", "c": "f*1", "a": "f*b", "b": "f*a",
    }  # fmt: skip
    for index in range(len(graph.nodes)):
        assert graph.numerical(index) == pytest.approx(graph.gradients[index], abs=1e-8)


def test_the_chain_rule_is_written_in_numbers():
    steps = steps_of(ScalarGraph.of("(a*b + c) * f", AT))
    assert [step.title for step in steps if not step.backward] == [
        "e = a*b", "d = e + c", "L = d*f",
    ]  # fmt: skip
    assert steps[0].lines == ("e = a*b = 2*(-3) = -6", "de/da = b = -3", "de/db = a = 2")
    backward = [step for step in steps if step.backward]
    assert [step.title for step in backward] == ["dL/dL = 1", "dL/dd = -2", "dL/de = -2"]
    assert backward[0].lines == ("dL/dd = f = -2", "dL/df = d = 4")
    assert backward[2].lines[0] == "dL/da = dL/de * de/da = dL/de * b = -2 * (-3) = 6"


def test_a_value_that_is_used_twice_receives_two_gradients():
    graph = ScalarGraph.of("a*a + a", {"a": 3})
    assert graph.gradients[0] == 7
    lines = [line for step in steps_of(graph) if step.backward for line in step.lines]
    assert [line for line in lines if "+=" in line] == [
        "dL/da += dL/de * de/da = dL/de * a = 1 * 3 = 3, now 4",
        "dL/da += dL/de * de/da = dL/de * a = 1 * 3 = 3, now 7",
    ]


def test_an_unused_result_and_constants_have_no_gradient():
    graph = ScalarGraph.of("e = a*2; L = b + 1", {"a": 1, "b": 2})
    assert by_name(graph, graph.gradients) == {
        "a": None, "2": None, "e": None, "b": 1, "1": None, "L": 1,
    }  # fmt: skip
    assert graph.numerical(0) is None


def test_another_value_changes_everything_after_it():
    graph = ScalarGraph.of("(a*b + c) * f", AT).with_value("a", 4)
    assert graph.values[graph.output] == 4
    assert by_name(graph, graph.gradients)["f"] == -2


@pytest.mark.parametrize(
    ("text", "message", "marked"),
    [
        ("", "empty", ""),
        ("a +", "not a valid expression", ""),
        ("2a", "not a valid expression", "a"),
        ("sigmoid(a)", "there is no function sigmoid", "sigmoid"),
        ("a ^ 2", "not a power", "a ^ 2"),
        ("a + (b < c)", "not supported", "b < c"),
        ("__import__('os')", "there is no function __import__", "__import__"),
        ("a.b", "not supported", "a.b"),
        ("a + 'b'", "not supported", "'b'"),
        ("True*a", "not supported", "True"),
        ("3*4", "nothing to differentiate", "3*4"),
        ("tanh + a", "tanh is a function", "tanh"),
        ("tanh(a, b)", "takes one value", "tanh(a, b)"),
        ("e = a*b; e = a + b", "assigned twice", "e"),
        ("a = b*2; b = a*3", "already used", "b"),
        ("e = a; e*2", "second name", "a"),
        ("a*b; a + b", "without a name", "a*b"),
        ("é*b + (ü < 1)", "not supported", "ü < 1"),
        ("a" + "+a" * MAX_NODES, "more than", None),
        ("a*1e999", "too large", "1e999"),
    ],
)
def test_errors_point_at_the_place(text, message, marked):
    with pytest.raises(GraphError, match=message) as caught:
        parse(text)
    error = caught.value
    if marked is not None:
        assert error.text[error.start : error.end] == marked
    assert "^" in error.pointed


@pytest.mark.parametrize(
    ("text", "values", "message", "marked"),
    [
        ("1 + a/b", {"a": 1, "b": 0}, "division by zero", "a/b"),
        ("log(a) + 1", {"a": -2}, "logarithm of a negative number, -2", "log(a)"),
        ("log(a)", {"a": 0}, "logarithm of zero", "log(a)"),
        ("a**b", {"a": -2, "b": 0.5}, "not a real number", "a**b"),
        ("a**b", {"a": 0, "b": -1}, "division by zero", "a**b"),
        ("exp(a)", {"a": 1000}, "too large", "exp(a)"),
        ("a*b", {"a": 1e200, "b": 1e200}, "too large", "a*b"),
        ("a*b", {"a": 1}, "b has no value", "b"),
        ("a*b", {}, "a, b have no value", "a"),
        ("a*b", {"a": float("nan"), "b": 1}, "a is nan", "a"),
        ("e = a*b; e + 1", {"a": 1, "b": 1, "e": 1}, "e is computed", "e = a*b"),
        ("a*b", {"a": 1, "b": 1, "q": 1}, "there is no q", "a"),
    ],
)
def test_values_that_cannot_be(text, values, message, marked):
    with pytest.raises(GraphError, match=message) as caught:
        ScalarGraph.of(text, values)
    assert caught.value.text[caught.value.start : caught.value.end] == marked
    assert caught.value.hint


def test_values_of_the_command_line():
    assert parse_values(["a=2", "b=-3e-1"]) == {"a": 2, "b": -0.3}
    for given, message, marked in (
        (["a=2", "b"], "b is not a value", "b"),
        (["a=2", "a=3"], "a is given twice", "a=3"),
        (["a=2", "b=two"], "two is not a number", "two"),
    ):
        with pytest.raises(GraphError, match=message) as caught:
            parse_values(given)
        assert caught.value.text[caught.value.start : caught.value.end] == marked


def test_both_errors_of_numerical_gradients_are_seen():
    graph = example("neuron")
    index = graph.expression.index("w1")
    points = {round(p.h, 16): p for p in sweep(graph, index, 16)}  # one a decade
    # Truncation falls as h for forward differences, as h² for central ones; rounding grows as 1/h.
    assert 5 < points[1e-3].forward / points[1e-4].forward < 20
    assert 50 < points[1e-2].central / points[1e-3].central < 200
    assert points[1e-13].central > 1e3 * points[1e-6].central
    assert "left of it rounding" in sweep_summary(graph, index, list(points.values()))


def test_what_a_sweep_shows_where_there_is_no_truncation_or_no_derivative():
    line = ScalarGraph.of("(a*b + c) * f", AT)
    assert "only rounding" in sweep_summary(line, 0, sweep(line, 0))
    kink = ScalarGraph.of("relu(a)", {"a": 0})
    assert kink.gradients[0] == 0
    assert kink.numerical(0) == 0.5
    assert "kink" in sweep_summary(kink, 0, sweep(kink, 0))
    edge = ScalarGraph.of("log(a)", {"a": 1e-9})
    assert sweep(edge, 0)[-1].central is None


@pytest.mark.parametrize(
    ("text", "a"),
    [("log(a)", 0.05), ("log(a)", 1e-12), ("relu(a)", 0.01), ("tanh(50*a)", 0.1), ("a**3", 0.0)],
)
def test_truncation_is_seen_wherever_it_begins(text, a):
    graph = ScalarGraph.of(text, {"a": a})
    index = graph.expression.index("a")
    assert "right of it truncation" in sweep_summary(graph, index, sweep(graph, index))


@pytest.mark.parametrize(
    ("text", "a"), [("a**2", 3.0), ("(100*a)**2", 0.001), ("1e6*a - 1e6", 1.0)]
)
def test_rounding_of_values_larger_than_the_output_is_no_truncation(text, a):
    graph = ScalarGraph.of(text, {"a": a})
    index = graph.expression.index("a")
    assert "only rounding" in sweep_summary(graph, index, sweep(graph, index))


def test_three_learning_rates():
    small, right, large = three_rates(example("weight"), "w").runs
    assert [small.label, right.label, large.label] == ["too small", "right", "too large"]
    first = right.weights[0] - right.learning_rate * right.gradients[0]
    assert right.weights[1] == pytest.approx(first)
    start = right.outputs[0]
    assert right.outputs[-1] < 1e-6 * start < 0.1 * start < small.outputs[-1] < start
    assert large.outputs[-1] > start


def test_descent_that_no_rate_is_too_large_for_and_without_a_gradient():
    line = three_rates(ScalarGraph.of("(a*b + c) * f", AT), "a")
    assert "no rate up to 1000 is too large" in line.verdict
    assert "a goes down" in line.verdict
    assert len(line.runs) == 3
    far = three_rates(ScalarGraph.of("(0.001*a - 1)**2", {"a": 0}), "a")
    assert far.verdict.endswith("a goes up; no rate up to 1000 is too large"), "its minimum is 1000"
    still = three_rates(example("neuron"), "w2")
    assert (still.runs, "no step of any size" in still.verdict) == ((), True)


def test_a_saturated_neuron_hardly_moves():
    saturated = ScalarGraph.of("tanh(w*x)", {"w": 9, "x": 2})
    descent = three_rates(saturated, "w")
    assert descent.runs == ()
    assert "so little that no rate" in descent.verdict


@pytest.mark.parametrize("name", [each.name for each in EXAMPLES])
def test_every_node_has_a_place_of_its_own(name):
    graph = example(name)
    placed = layout(graph.expression)
    assert len(set(placed.places)) == len(graph.nodes)
    for source, target in placed.edges:
        assert placed.places[source][0] < placed.places[target][0]
    root = ET.fromstring(svg(graph))
    texts = "".join(root.itertext())
    assert all(node.name in texts for node in graph.nodes)
    boxes = [each for each in root.iter() if each.get("class", "").startswith("box")]
    assert len(boxes) == len(graph.nodes)


def test_texts_in_the_picture_are_escaped():
    picture = svg(ScalarGraph.of("relu(a) * (-2)", {"a": 1}))
    assert "(a > 0)" in "".join(ET.fromstring(picture).itertext()) or "a &gt; 0" in picture

"""Folding, searching and following an autograd graph, and its pictures."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from tui_trainer.client.answers.autograd import (
    dot,
    find_leaf,
    fold,
    lines,
    matches,
    path_to_loss,
    svg,
)
from tui_trainer.protocol.autograd import AutogradGraph, GraphModule, GraphNode
from tui_trainer.runs.errors import RunError


def residual(blocks: int) -> AutogradGraph:
    """loss ← head ← blocks of x + linear(x) ← embedding."""
    modules = [GraphModule(""), GraphModule("", "Net"), GraphModule("head", "Linear")]
    modules += [GraphModule(f"blocks.{i}", "Block") for i in range(blocks)]
    modules += [GraphModule("embedding", "Embedding")]
    nodes: list[GraphNode] = []

    def add(operation: str, module: int, inputs: tuple[int, ...], flows: tuple[float, ...]) -> None:
        gradient = max(flows, default=1.0)
        nodes.append(GraphNode(operation, module, (4, 8), "float32", inputs, flows, gradient, 128))

    size = 2 + 2 * blocks + 1
    add("NllLoss", 0, (1,), (1.0,))
    add("Addmm", 2, (2, size), (0.5, 2.0))
    for i in reversed(range(blocks)):
        here = len(nodes)
        add("Add", 3 + i, (here + 1, here + 2), (0.1, 0.9))
        add("Mm", 3 + i, (here + 2, size + 1 + i), (0.05, 0.3))
    add("Embedding", 3 + blocks, (size + 1 + blocks,), (0.9,))
    names = ["head.weight", *(f"blocks.{i}.weight" for i in range(blocks)), "embedding.weight"]
    nodes += [GraphNode("parameter", 0, (8, 8), "float32", leaf=name) for name in names]
    return AutogradGraph(tuple(nodes), tuple(modules), "rerun", 1.5, True, 999)


def test_equal_blocks_are_shown_once():
    rows = [(depth, row.label, row.count) for depth, row in lines(fold(residual(12)))]
    assert rows == [
        (0, "loss", 1),
        (1, "NllLoss", 1),
        (1, "Net", 1),
        (2, "head", 1), (3, "Addmm", 1), (3, "weight", 1),
        (2, "blocks", 1),
        (3, "0 … 11", 12), (4, "Add", 1), (4, "Mm", 1), (4, "weight", 1),
        (2, "embedding", 1), (3, "Embedding", 1), (3, "weight", 1),
    ]  # fmt: skip
    whole = list(lines(fold(residual(12), repeats=False)))
    assert sum(row.kind == "operation" for _, row in whole) == 27
    repeated = next(row for _, row in lines(fold(residual(12))) if row.kind == "repeat")
    assert (repeated.operations, repeated.saved_bytes) == (24, 24 * 128)
    assert [depth for depth, _ in lines(fold(residual(12)), 1)] == [0, 1, 1]


def test_a_block_that_differs_is_shown_itself():
    graph = residual(4)
    nodes = list(graph.nodes)
    at = next(i for i, n in enumerate(nodes) if n.operation == "Mm" and n.module == 4)
    changed = GraphNode("Bmm", *[getattr(nodes[at], f) for f in nodes[at].__struct_fields__[1:]])
    nodes[at] = changed
    other = AutogradGraph(tuple(nodes), graph.modules, "rerun")
    labels = [row.label for _, row in lines(fold(other)) if row.kind in ("repeat", "module")]
    assert labels == ["Net", "head", "blocks", "2 … 3", "1", "0", "embedding"]


def test_paths_follow_the_largest_gradient_and_are_counted():
    graph = residual(10)
    found = path_to_loss(graph, find_leaf(graph, "embedding"))
    assert [graph.nodes[i].operation for i in found.nodes] == (
        ["parameter", "Embedding"] + ["Add"] * 10 + ["Addmm", "NllLoss"]
    )
    assert found.gradients[0] == 0.9
    assert found.paths == 2**10
    unknown = AutogradGraph(
        tuple(
            GraphNode(n.operation, n.module, n.shape, n.dtype, n.inputs,
                      (math.nan,) * len(n.inputs), leaf=n.leaf)
            for n in graph.nodes
        ),
        graph.modules,
        "live",
    )  # fmt: skip
    assert len(path_to_loss(unknown, find_leaf(unknown, "embedding")).nodes) == 14


def test_leaves_and_nodes_are_found_by_words():
    graph = residual(3)
    assert graph.nodes[find_leaf(graph, "blocks.1.weight")].leaf == "blocks.1.weight"
    with pytest.raises(RunError, match="5 leaves match weight"):
        find_leaf(graph, "weight")
    with pytest.raises(RunError, match="no leaf"):
        find_leaf(graph, "bias")
    assert len(matches(graph, "block mm")) == 3
    assert len(matches(graph, "nothing")) == 0


def test_pictures_hold_every_shown_row_and_edge():
    graph = residual(12)
    drawn = ElementTree.fromstring(svg(graph, 'a "title" <&>'))
    space = "{http://www.w3.org/2000/svg}"
    texts = [each.text for each in drawn.iter(f"{space}text")]
    assert 'a "title" <&>' in texts
    assert "0 … 11 × 12" in texts
    assert len(list(drawn.iter(f"{space}path"))) == 9
    text = dot(graph, 'a "title"')
    assert text.count("->") == graph.edges
    assert text.count("{") == text.count("}")
    assert text.count("subgraph") == 2 + 12 + 1  # blocks too
    assert 'label="a \\"title\\""' in text


def test_graphs_that_are_deep_or_of_one_node():
    deep = tuple(GraphNode("Mul", 0, (), "float32", (i + 1,), (1.0,), 1.0) for i in range(20_000))
    leaf = GraphNode("input", 0, (), "float32", leaf="input 0")
    graph = AutogradGraph((*deep, leaf), (GraphModule(""),), "live")
    assert [row.count for _, row in lines(fold(graph))] == [1, 20_000, 1]
    assert path_to_loss(graph, find_leaf(graph, "input")).paths == 1
    assert len(dot(graph, "deep")) > 20_000
    single = AutogradGraph((GraphNode("Sum", 0, (), "float32"),), (GraphModule(""),), "live")
    assert [row.label for _, row in lines(fold(single))] == ["loss", "Sum"]
    ElementTree.fromstring(svg(single, "one"))

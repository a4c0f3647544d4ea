"""The autograd graph of a step: its nodes, what they save, and the gradients along its edges,
against plain autograd."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.inspector.custom_function import Halved
from tests.inspector.test_inspector import Traced
from tests.inspector.test_rerun import Everything
from tests.trace.support import SmallGpt, gpt_loop, mlp
from tui_trainer.inspector.autograd_graph import _Walk
from tui_trainer.inspector.errors import InspectionError
from tui_trainer.protocol.autograd import AutogradGraph, DescribeGraph


def graphs(loop, phases=("backward",), request: bool = True, before=lambda: None):
    """(step, phase) → its graph, or why there is none."""
    found: dict[tuple[int, str], AutogradGraph | str] = {}

    def look(inspector, phase, step):
        if phase in phases:
            before()
            try:
                answer = inspector.answer(DescribeGraph())
                assert isinstance(answer, AutogradGraph)
                found[step, phase] = answer
            except InspectionError as error:
                found[step, phase] = error.message

    traced = Traced(look)
    if request:
        traced.inspector.capture.request()
    traced.run(loop)
    return found


def test_gradients_and_saved_bytes_are_those_of_plain_autograd():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(4, 6), torch.randint(0, 3, (4,))
    plain = copy.deepcopy(model)
    hidden = plain[1](plain[0](x))
    hidden.retain_grad()
    out = plain[2](hidden)
    out.retain_grad()
    F.cross_entropy(out, y).backward()

    def loop():
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    graph = graphs(loop)[1, "backward"]
    nodes = {(n.operation, graph.modules[n.module].path): n for n in graph.nodes if not n.leaf}
    leaves = {n.leaf: n for n in graph.nodes if n.leaf}
    for name, parameter in model.named_parameters():
        assert leaves[name].gradient == pytest.approx(float(parameter.grad.norm()), rel=1e-5)
        assert leaves[name].shape == tuple(parameter.shape)
    last = nodes["Addmm", "2"]
    assert last.gradient == pytest.approx(float(out.grad.norm()), rel=1e-5)
    tanh = nodes["Tanh", "1"]
    assert tanh.gradient == pytest.approx(float(hidden.grad.norm()), rel=1e-5)
    assert tanh.saved_bytes == 4 * 8 * 4
    assert [m.kind for m in graph.modules] == ["", "Sequential", "Linear", "Tanh", "Linear"]
    by_input = dict(zip([graph.nodes[i].operation for i in last.inputs], last.gradients,
                        strict=True))  # fmt: skip
    assert by_input["Tanh"] == pytest.approx(float(hidden.grad.norm()), rel=1e-5)
    assert by_input["T"] == pytest.approx(float(model[2].weight.grad.norm()), rel=1e-5)
    assert graph.same_loss is True
    assert graph.notes == ()
    # x, the result of tanh, log-softmax (4×3), the targets, and the sum of the weights of classes
    assert graph.saved_bytes == 4 * 6 * 4 + 4 * 8 * 4 + 4 * 3 * 4 + 4 * 8 + 4


def test_a_node_comes_before_its_inputs_and_each_edge_has_a_gradient():
    torch.manual_seed(0)
    model = SmallGpt(layers=3)
    phases = ("data", "forward", "backward")
    found = graphs(lambda: gpt_loop(model, torch.optim.AdamW(model.parameters()), 2), phases)
    graph = found[2, "backward"]
    refused = "the loss cannot be computed again: "
    assert found[2, "data"] == f"{refused}the model has not been called yet in this step"
    assert found[2, "forward"] == f"{refused}it is not computed yet: continue to backward"
    for index, node in enumerate(graph.nodes):
        assert all(before > index for before in node.inputs)
        assert len(node.gradients) == len(node.inputs)
        assert all(math.isfinite(each) for each in node.gradients)
    assert {n.leaf for n in graph.nodes if n.leaf} == {n for n, _ in model.named_parameters()}


def test_without_a_re_run_the_graph_of_the_loss_itself_is_read():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = []

    def loop():
        for _ in range(2):
            loss = (Halved.apply(model(torch.randn(4, 6))) - torch.randn(4, 3)).abs().mean()
            kept.append(loss)
            loss.backward()
            optimizer.step()
            kept.clear()

    found = graphs(loop, ("loss", "backward"))
    for graph in found.values():
        assert graph.source == "live"
        assert graph.saved_bytes is None
        assert "the loss" in graph.notes[0]
        paths = {graph.modules[n.module].path for n in graph.nodes if n.operation == "Addmm"}
        assert paths == {"0", "2"}


def test_a_checkpointed_forward_is_not_computed_again_to_count_what_it_saves():
    torch.manual_seed(0)
    calls = []

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.part, x, use_reentrant=False)

        def part(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return self.inner(x)

    model = Checkpointed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop():
        F.cross_entropy(model(torch.randn(4, 6)), torch.randint(0, 3, (4,))).backward()
        optimizer.step()

    graph = graphs(loop)[1, "backward"]
    assert graph.saved_bytes is None
    assert any("packed by hooks" in note for note in graph.notes)
    assert len(calls) == 4  # twice by the step, twice by the re-run


def test_an_unseen_step_says_from_when_on():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop():
        for _ in range(2):
            F.cross_entropy(model(torch.randn(4, 6)), torch.randint(0, 3, (4,))).backward()
            optimizer.step()

    found = graphs(loop, ("backward",), request=False)
    assert found[1, "backward"].source == "live"
    assert "from the next step on" in found[1, "backward"].notes[0]
    assert found[2, "backward"].source == "rerun"


def test_layers_with_state_of_every_kind():
    torch.manual_seed(0)
    model = Everything()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop():
        for _ in range(2):
            F.cross_entropy(model(torch.randn(5, 6)), torch.randint(0, 3, (5,))).backward()
            optimizer.step()
            optimizer.zero_grad()

    graph = graphs(loop)[2, "backward"]
    assert graph.same_loss is True
    kinds = {graph.modules[n.module].kind for n in graph.nodes}
    assert {"BatchNorm1d", "Dropout", "Linear", "Everything"} <= {*kinds, "Everything"}


def test_ten_thousand_nodes_are_walked_without_recursion():
    x = torch.ones(3, requires_grad=True)
    y = x
    for _ in range(10_000):
        y = y * 1.0001
    loss = y.sum()
    walk = _Walk(loss.grad_fn, {id(x): "x"})
    walk.count_saved([x])
    walk.measure_gradients(loss)
    nodes = walk.described(lambda node: 0)
    assert len(nodes) == 10_002
    assert nodes[-1].leaf == "x"
    assert nodes[-1].gradient == pytest.approx(math.sqrt(3) * 1.0001**10_000, rel=1e-3)

"""The time to read and open an autograd graph of 10,000 nodes: on the training side the walk with
saved bytes and the gradient of each edge, on the viewing side decoding and folding.

.venv/bin/python benchmarks/autograd_graph.py [OPERATIONS]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec
import torch

from tui_trainer.client.answers.autograd import fold, lines, path_to_loss
from tui_trainer.inspector.autograd_graph import _Walk
from tui_trainer.protocol.autograd import AutogradGraph, GraphModule

T = TypeVar("T")


def loss_of(operations: int, parameters: list[torch.Tensor]) -> torch.Tensor:
    """A chain of additions and products over some parameters."""
    x = parameters[0]
    for number in range(operations // 2):
        x = x * 0.999 + parameters[number % len(parameters)]
    return x.sum()


def timed(name: str, work: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    result = work()
    took = time.perf_counter() - began
    print(f"{name:<44} {took * 1e3:9.1f} ms")
    return result, took


def main() -> None:
    operations = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    torch.set_num_threads(1)
    parameters = [torch.randn(64, requires_grad=True) for _ in range(100)]
    names = {id(each): f"layers.{n}.weight" for n, each in enumerate(parameters)}
    loss, forward = timed("forward", lambda: loss_of(operations, parameters))
    timed("plain backward", lambda: torch.autograd.grad(loss, parameters, retain_graph=True))
    walk, walked = timed("walk", lambda: _Walk(loss.grad_fn, names))
    _, counted = timed("bytes saved", lambda: walk.count_saved(parameters))
    _, flowed = timed(
        "backward with the gradient of each edge", lambda: walk.measure_gradients(loss)
    )
    nodes, described = timed("description", lambda: walk.described(lambda node: 1))
    graph = AutogradGraph(nodes, (GraphModule(""), GraphModule("", "Chain")), "rerun")
    data, _ = timed("message", lambda: msgspec.msgpack.encode(graph))
    received, decoded = timed(
        "viewer: decoded", lambda: msgspec.msgpack.decode(data, type=AutogradGraph)
    )
    _, folded = timed("viewer: folded", lambda: list(lines(fold(received))))
    leaf = len(nodes) - 1
    timed("viewer: path from a parameter to the loss", lambda: path_to_loss(received, leaf))
    total = forward + walked + counted + flowed + described + decoded + folded
    edges = sum(len(node.inputs) for node in nodes)
    size = len(data) / 1e6
    print(f"{len(nodes):,} nodes, {edges:,} edges, {size:.1f} MB: open in {total * 1e3:.0f} ms")


if __name__ == "__main__":
    main()

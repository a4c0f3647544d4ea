"""Where the loss's graph comes from, and what `.item()` cuts off."""

from __future__ import annotations

import torch

from tui_trainer.learn.measurement_process import Value
from tui_trainer.learn.measurements.small_models import (
    graph_nodes,
    leaves,
    loss_of,
    random_batch,
    small_gpt,
)

BATCHES = 3


def measure() -> dict[str, Value]:
    """Walk the graph of a loss, and of sums of losses."""
    model = small_gpt()
    batch = random_batch()
    loss = loss_of(model, batch)
    nodes = graph_nodes(loss)
    assert loss.grad_fn is not None
    with torch.no_grad():
        without = loss_of(model, batch)
    return {
        "loss": loss.item(),
        "grad_fn": loss.grad_fn.name(),
        "operations": len(nodes),
        "leaves": len(leaves(nodes)),
        "parameters": len(list(model.parameters())),
        "item_type": type(loss.item()).__name__,
        "detached_operations": len(graph_nodes(loss.detach())),
        "no_grad_operations": len(graph_nodes(without)),
        "batches": BATCHES,
        "kept": _kept(model, BATCHES),
        "twice_batches": 2 * BATCHES,
        "twice_kept": _kept(model, 2 * BATCHES),
    }


def _kept(model: torch.nn.Module, batches: int) -> int:
    """Number of operations that a sum of losses keeps in memory, without the shared leaves."""
    total = torch.zeros(())
    for _ in range(batches):
        total = total + loss_of(model, random_batch())
    nodes = graph_nodes(total)
    return len(nodes) - len(leaves(nodes))

"""A tensor against the scalars in it: the same loss, the same gradients, fewer nodes."""

from __future__ import annotations

import torch
from torch import Tensor

from tui_trainer.learn.measurement_process import Value
from tui_trainer.learn.measurements.small_models import graph_nodes

ROWS, COLUMNS = 3, 4


def measure() -> dict[str, Value]:
    """Compute the loss of a layer with one tensor, and with a tensor for each entry."""
    tensor = _with_tensor(ROWS)
    weight, x, target, loss = tensor
    loss.backward()
    scalars, scalar_loss = _with_scalars(weight, x, target)
    scalar_loss.backward()
    assert weight.grad is not None
    gradients = torch.tensor([[_gradient(scalar) for scalar in row] for row in scalars])
    nodes, scalar_nodes = len(graph_nodes(loss)), len(graph_nodes(scalar_loss))

    taller = _with_tensor(2 * ROWS)
    taller_scalars = _with_scalars(taller[0], taller[1], taller[2])[1]
    return {
        "rows": ROWS,
        "columns": COLUMNS,
        "entries": weight.numel(),
        "tensor_loss": loss.item(),
        "scalar_loss": scalar_loss.item(),
        "tensor_gradient": weight.grad[0, 0].item(),
        "scalar_gradient": gradients[0, 0].item(),
        "by_hand": (2 * (weight[0] @ x - target[0]) * x[0]).item(),
        "difference": (weight.grad - gradients).abs().max().item(),
        "tensor_nodes": nodes,
        "scalar_nodes": scalar_nodes,
        "more_rows": 2 * ROWS,
        "more_tensor_nodes": len(graph_nodes(taller[3])),
        "more_scalar_nodes": len(graph_nodes(taller_scalars)),
    }


def _with_tensor(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight, an input, a target, and the loss (W x − t)²."""
    weight = torch.randn(rows, COLUMNS, requires_grad=True)
    x, target = torch.randn(COLUMNS), torch.randn(rows)
    return weight, x, target, ((weight @ x - target) ** 2).sum()


def _with_scalars(weight: Tensor, x: Tensor, target: Tensor) -> tuple[list[list[Tensor]], Tensor]:
    """(entries of the weight as scalar tensors, the same loss computed from them)."""
    entries = [[entry.detach().clone().requires_grad_() for entry in row] for row in weight]
    loss = torch.zeros(())
    for row, wanted in zip(entries, target, strict=True):
        output = row[0] * x[0]
        for entry, value in zip(row[1:], x[1:], strict=True):
            output = output + entry * value
        loss = loss + (output - wanted) ** 2
    return entries, loss


def _gradient(scalar: Tensor) -> float:
    assert scalar.grad is not None
    return scalar.grad.item()

"""`.grad` before and after `backward`, and the meaning of its numbers."""

from __future__ import annotations

import torch
from torch import nn

from tui_trainer.learn.measurement_process import Value
from tui_trainer.learn.measurements.small_models import (
    gradient_vector,
    loss_of,
    random_batch,
    small_gpt,
)

WEIGHT = "blocks.0.mlp.up.weight"
H = 1e-4


def measure() -> dict[str, Value]:
    """Count gradients around `backward`, and compare one with the slope of the loss."""
    model = small_gpt().double()
    batch = random_batch()
    parameters = list(model.parameters())
    before = _missing(parameters)
    loss = loss_of(model, batch)
    after_forward = _missing(parameters)
    loss.backward()
    after_backward = _missing(parameters)

    weight = model.get_parameter(WEIGHT)
    assert weight.grad is not None
    row, column = divmod(int(weight.grad.abs().argmax()), weight.shape[1])
    gradient = weight.grad[row, column].item()
    losses = []
    with torch.no_grad():
        for step in (H, -2 * H, H):  # up, down, and back
            weight[row, column] += step
            losses.append(loss_of(model, batch).item())

    gradients = gradient_vector(parameters)
    torch.optim.SGD(parameters, lr=0.1).step()
    return {
        "parameters": len(parameters),
        "none_before": before,
        "none_after_forward": after_forward,
        "none_after_backward": after_backward,
        "weight": WEIGHT,
        "shape": "×".join(map(str, weight.shape)),
        "gradient_shape": "×".join(map(str, weight.grad.shape)),
        "entry": [row, column],
        "gradient": gradient,
        "h": H,
        "slope": (losses[0] - losses[1]) / (2 * H),
        "left_after_step": len(parameters) - _missing(parameters),
        "changed_by_step": (gradient_vector(parameters) - gradients).abs().max().item(),
    }


def _missing(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.grad is None for parameter in parameters)

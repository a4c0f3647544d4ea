"""Clipping: g · (c / ‖g‖), with the vector before and after."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from tui_trainer.learn.measurement_process import Value

LIMIT = 1.0


def measure() -> dict[str, Value]:
    """Clip the gradient of a model of three parameters by its norm and by its values."""
    model = nn.Linear(2, 1)
    inputs, targets = torch.randn(16, 2), 4 + torch.randn(16, 1)
    gradient = _gradient(model, inputs, targets)
    returned = clip_grad_norm_(model.parameters(), LIMIT).item()
    clipped = _vector(model)

    _gradient(model, inputs, targets)
    clip_grad_value_(model.parameters(), LIMIT)
    by_value = _vector(model)

    _gradient(model, inputs, targets)
    loose = 2 * returned
    clip_grad_norm_(model.parameters(), loose)
    return {
        "gradient": gradient.tolist(),
        "norm": gradient.norm().item(),
        "returned": returned,
        "limit": LIMIT,
        "scale": LIMIT / gradient.norm().item(),
        "clipped": clipped.tolist(),
        "clipped_norm": clipped.norm().item(),
        "cosine": torch.cosine_similarity(gradient, clipped, dim=0).item(),
        "by_value": by_value.tolist(),
        "value_cosine": torch.cosine_similarity(gradient, by_value, dim=0).item(),
        "loose_limit": loose,
        "loose_norm": _vector(model).norm().item(),
    }


def _gradient(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the squared error, as `backward` leaves it."""
    model.zero_grad()
    nn.functional.mse_loss(model(inputs), targets).backward()
    return _vector(model)


def _vector(model: nn.Module) -> Tensor:
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients])

"""The update of one weight in numbers, by SGD, momentum, RMSprop, Adam and AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from tui_trainer.learn.measurement_process import Value

LEARNING_RATE, MOMENTUM, DECAY = 0.1, 0.9, 0.1
FACTOR = 1000
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda weights: SGD(weights, lr=LEARNING_RATE),
    "momentum": lambda weights: SGD(weights, lr=LEARNING_RATE, momentum=MOMENTUM),
    "rmsprop": lambda weights: RMSprop(weights, lr=LEARNING_RATE),
    "adam": lambda weights: Adam(weights, lr=LEARNING_RATE),
    "adamw": lambda weights: AdamW(weights, lr=LEARNING_RATE, weight_decay=DECAY),
}


def measure() -> dict[str, Value]:
    """Give every optimizer the same weight and the same two gradients."""
    weight, first = torch.randn(2).tolist()
    unused = [nn.Parameter(torch.zeros(1))]
    second = 0.5 * first + 0.1 * torch.randn(()).item()
    values: dict[str, Value] = {
        "learning_rate": LEARNING_RATE,
        "momentum": MOMENTUM,
        "alpha": OPTIMIZERS["rmsprop"](unused).param_groups[0]["alpha"],
        "beta_2": OPTIMIZERS["adam"](unused).param_groups[0]["betas"][1],
        "decay": DECAY,
        "weight": weight,
        "first": first,
        "second": second,
        "factor": FACTOR,
    }
    states: dict[str, dict[str, Any]] = {}
    for name in OPTIMIZERS:
        moves, states[name] = _moves(name, weight, [first, second])
        values[f"{name}_1"], values[f"{name}_2"] = moves
    values |= {
        "momentum_b": states["momentum"]["momentum_buffer"].item(),
        "rmsprop_v": states["rmsprop"]["square_avg"].item(),
        "adam_m": states["adam"]["exp_avg"].item(),
        "adam_v": states["adam"]["exp_avg_sq"].item(),
        "decay_1": -LEARNING_RATE * DECAY * weight,
    }
    for name in ("sgd", "adam"):
        values[f"{name}_big"] = _moves(name, weight, [FACTOR * first])[0][0]
    return values


def _moves(name: str, weight: float, gradients: list[float]) -> tuple[list[float], dict[str, Any]]:
    """(change of the weight in each step, state of the optimizer after the last step)."""
    parameter = nn.Parameter(torch.tensor([weight], dtype=torch.float64))
    optimizer = OPTIMIZERS[name]([parameter])
    moves = []
    for gradient in gradients:
        before = parameter.item()
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        moves.append(parameter.item() - before)
    return moves, optimizer.state[parameter]

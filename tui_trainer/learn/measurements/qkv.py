"""Q, K, V: three matrices, three inits, three gradients, and how they diverge."""

from __future__ import annotations

import torch
from torch import Tensor

from tui_trainer.learn.measurement_process import Value
from tui_trainer.learn.measurements.small_models import loss_of, random_batch, small_gpt
from tui_trainer.models.gpt import GPT, CausalSelfAttention

SHOWN = (0, 10, 40)
COPIED_STEPS = 10
NAMES = ("q", "k", "v")


def measure() -> dict[str, Value]:
    """Train a GPT of one block, and compare the three matrices of its attention on the way."""
    model = small_gpt(layers=1)
    weights = _weights(model)
    start = [weight.detach().clone() for weight in weights]
    values: dict[str, Value] = {f"step_{number}": step for number, step in enumerate(SHOWN)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for step in range(SHOWN[-1] + 1):
        optimizer.zero_grad()
        loss_of(model, random_batch()).backward()
        if step == 0:
            gradients = [_gradient(weight) for weight in weights]
            for name, weight, gradient in zip(NAMES, weights, gradients, strict=True):
                values[f"norm_{name}"] = weight.norm().item()
                values[f"gradient_{name}"] = gradient.norm().item()
            values["gradient_cosine"] = _cosine(gradients[0], gradients[1])
        if step in SHOWN:
            number = SHOWN.index(step)
            values[f"qk_{number}"] = _cosine(weights[0], weights[1])
            values[f"qv_{number}"] = _cosine(weights[0], weights[2])
            for name, weight, first in zip(NAMES, weights, start, strict=True):
                drift = (weight - first).norm() / first.norm()
                values[f"drift_{name}_{number}"] = drift.item()
        optimizer.step()
    return values | _from_a_copy()


def _from_a_copy() -> dict[str, Value]:
    """Train a model that begins with Wk = Wq."""
    model = small_gpt(layers=1)
    query, key, _ = _weights(model)
    with torch.no_grad():
        key.copy_(query)
    copied = _cosine(query, key)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(COPIED_STEPS):
        optimizer.zero_grad()
        loss_of(model, random_batch()).backward()
        optimizer.step()
    return {
        "copied_cosine": copied,
        "copied_steps": COPIED_STEPS,
        "copied_after": _cosine(query, key),
    }


def _weights(model: GPT) -> list[Tensor]:
    """Wq, Wk and Wv of the first block."""
    attention = model.get_submodule("blocks.0.attention")
    assert isinstance(attention, CausalSelfAttention)
    return [attention.W_query.weight, attention.W_key.weight, attention.W_value.weight]


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad.detach().clone()


def _cosine(one: Tensor, other: Tensor) -> float:
    """⟨A, B⟩ / (‖A‖ ‖B‖)"""
    return torch.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()

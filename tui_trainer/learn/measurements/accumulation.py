"""Why gradients accumulate, and what `zero_grad` leaves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tui_trainer.learn.measurement_process import Value
from tui_trainer.learn.measurements.small_models import (
    gradient_vector,
    loss_of,
    random_batch,
    small_gpt,
)

EXAMPLES = 8


def measure() -> dict[str, Value]:
    """Call `backward` several times, and step after both kinds of `zero_grad`."""
    model = small_gpt()
    parameters = list(model.parameters())
    inputs, targets = random_batch(EXAMPLES)
    norms = []
    for _ in range(3):
        loss_of(model, (inputs, targets)).backward()  # no zero_grad in between
        norms.append(gradient_vector(parameters).norm().item())

    model.zero_grad()
    loss_of(model, (inputs, targets)).backward()
    whole = gradient_vector(parameters)
    model.zero_grad()
    half = EXAMPLES // 2
    for part in (slice(0, half), slice(half, EXAMPLES)):
        (loss_of(model, (inputs[part], targets[part])) / 2).backward()
    halves = gradient_vector(parameters)

    none_moved, left_none = _moved_after(set_to_none=True)
    zeros_moved, left_zeros = _moved_after(set_to_none=False)
    assert left_zeros is not None
    return {
        "norm_once": norms[0],
        "norm_twice": norms[1],
        "ratio_twice": norms[1] / norms[0],
        "norm_thrice": norms[2],
        "ratio_thrice": norms[2] / norms[0],
        "examples": EXAMPLES,
        "half": half,
        "whole_norm": whole.norm().item(),
        "halves_norm": halves.norm().item(),
        "halves_cosine": torch.cosine_similarity(whole, halves, dim=0).item(),
        "left_none": str(left_none),
        "zeros_norm": left_zeros.norm().item(),
        "none_moved": none_moved,
        "zeros_moved": zeros_moved,
    }


def _moved_after(set_to_none: bool) -> tuple[float, Tensor | None]:
    """(norm of Adam's update after `zero_grad` without a `backward`, `.grad` before that step)."""
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    left = layer.weight.grad
    before = layer.weight.detach().clone()
    optimizer.step()
    return (layer.weight.detach() - before).norm().item(), left

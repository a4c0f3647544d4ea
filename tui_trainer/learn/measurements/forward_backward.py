"""Forward against backward, gradient descent against backpropagation."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tui_trainer.learn.measurement_process import Value
from tui_trainer.learn.measurements.small_models import (
    gradient_vector,
    loss_of,
    random_batch,
    small_gpt,
)
from tui_trainer.models.gpt import GPT

WATCHED = ("token_embedding", "blocks.0", "blocks.1", "norm", "head")
LEARNING_RATE = 0.1


def measure() -> dict[str, Value]:
    """Note the order in which modules are passed, count operations, and step in four directions."""
    model = small_gpt()
    batch = random_batch()
    parameters = list(model.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    forward_order, backward_order = _watch_order(model)

    with FlopCounterMode(display=False) as forward:
        loss = loss_of(model, batch)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    changed_by_backward = _changed(parameters, start)
    gradient = gradient_vector(parameters)
    random = torch.randn_like(gradient)
    random *= gradient.norm() / random.norm()

    def loss_after(direction: Tensor) -> float:
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(
                torch.cat([each.flatten() for each in start]) + LEARNING_RATE * direction,
                parameters,
            )
            return loss_of(model, batch).item()

    loss_uphill, loss_random = loss_after(gradient), loss_after(random)
    loss_downhill = loss_after(-gradient)
    return {
        "forward_order": list(forward_order[: len(WATCHED)]),
        "backward_order": list(backward_order[: len(WATCHED)]),
        "forward_flops": forward.get_total_flops() / 1e6,
        "backward_flops": backward.get_total_flops() / 1e6,
        "flops_ratio": backward.get_total_flops() / forward.get_total_flops(),
        "parameters": len(parameters),
        "changed_by_backward": changed_by_backward,
        "changed_by_step": _changed(parameters, start),
        "learning_rate": LEARNING_RATE,
        "loss": loss.item(),
        "loss_downhill": loss_downhill,
        "loss_random": loss_random,
        "loss_uphill": loss_uphill,
    }


def _watch_order(model: GPT) -> tuple[list[float | int | str], list[float | int | str]]:
    """(forward order, backward order): lists that fill with names of `WATCHED` as the outputs, and
    then their gradients, are computed."""
    forward: list[float | int | str] = []
    backward: list[float | int | str] = []

    def passed(name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        forward.append(name)
        if output.requires_grad:
            output.register_hook(lambda _: backward.append(name))

    for name in WATCHED:
        model.get_submodule(name).register_forward_hook(partial(passed, name))
    return forward, backward


def _changed(parameters: list[nn.Parameter], before: list[Tensor]) -> int:
    """Number of parameters whose values differ from those in `before`."""
    return sum(not torch.equal(now, then) for now, then in zip(parameters, before, strict=True))

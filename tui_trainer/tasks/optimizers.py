"""Optimizers by name, as PyTorch has them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tui_trainer.config.training import TrainingConfig


def make_optimizer(
    model: nn.Module, config: TrainingConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The configured optimizer over all parameters of `model`.

    Only parameters with two dimensions or more decay: biases, norms and single tokens do not.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {
            "params": [parameter for parameter in parameters if parameter.dim() < 2],
            "weight_decay": 0.0,
        },
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": config.learning_rate, **_implementation(config, device)}
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=betas, **options)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, betas=betas, **options)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, **options)
    return torch.optim.RMSprop(groups, momentum=config.momentum, **options)


def _implementation(config: TrainingConfig, device: torch.device) -> dict[str, bool]:
    """The arguments that choose among PyTorch's implementations.

    `auto`: fused on CUDA and on the CPU, where it is fastest, for all that have it; elsewhere
    whatever PyTorch itself takes.
    """
    if config.implementation == "auto":
        fused = config.optimizer != "rmsprop" and device.type in ("cuda", "cpu")
        return {"fused": True} if fused else {}
    if config.implementation == "loop":
        return {"foreach": False}
    return {config.implementation: True}


# ---- schedules
# How the learning rate runs over the steps.


class LearningRate:
    """The learning rate of each step, a function of the step alone: there is nothing to save."""

    def __init__(self, config: TrainingConfig, total_steps: int) -> None:
        self.kind = config.schedule
        self.peak = config.learning_rate
        self.floor = config.min_learning_rate
        self.warmup = config.warmup_steps
        self.total_steps = total_steps

    def at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0.

        Warm-up rises as nanoGPT's: peak · (step + 1) / (warmup + 1). Then it stays (constant),
        falls in a straight line (linear) or as half a cosine (Loshchilov & Hutter 2017), to reach
        the floor at `total_steps`.
        """
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return self.peak
        done = min(1.0, (step - self.warmup) / max(1, self.total_steps - self.warmup))
        left = 1 - done if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.floor + left * (self.peak - self.floor)

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Give every parameter group the learning rate of step `step`, counted from 0."""
        for group in optimizer.param_groups:
            group["lr"] = self.at(step)

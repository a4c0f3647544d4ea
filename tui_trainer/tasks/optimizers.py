"""Optimizers by name, as PyTorch has them."""

from __future__ import annotations

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

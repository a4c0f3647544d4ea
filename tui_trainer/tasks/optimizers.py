"""The configured optimizer and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tui_trainer.config.training import TrainingConfig


def create_optimizer(
    model: nn.Module, config: TrainingConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The configured optimizer over all trainable parameters of `model`.

    Weight decay applies to parameters of two or more dimensions, not to biases, norms and the class
    token.
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
    """The argument that selects one of PyTorch's implementations of an optimizer.

    `auto` selects the fused one, which is the fastest, on CUDA and the CPU if the optimizer has it;
    otherwise PyTorch chooses.
    """
    if config.implementation == "auto":
        fused = config.optimizer != "rmsprop" and device.type in ("cuda", "cpu")
        return {"fused": True} if fused else {}
    if config.implementation == "loop":
        return {"foreach": False}
    return {config.implementation: True}


Changed = tuple[int, float]
"""A step, counted from 0, and the learning rate that a user set for it during training."""


class LearningRate:
    """The learning rate as a function of the step, and of the changes that a user has made."""

    def __init__(self, config: TrainingConfig, total_steps: int) -> None:
        self.schedule = config.schedule
        self.peak = config.learning_rate
        self.minimum = config.min_learning_rate
        self.warmup_steps = config.warmup_steps
        self.total_steps = total_steps
        self._changes: dict[int | None, Changed] = {}
        """Number of a parameter group → its latest change; None: of all groups."""

    def at(self, step: int) -> float:
        """The scheduled learning rate of step `step`, counted from 0, without a user's changes.

        It rises as in nanoGPT, peak · (step + 1) / (warmup_steps + 1). Then it is constant or falls
        to the minimum at `total_steps`, linearly or as half a cosine (Loshchilov & Hutter 2017).
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return self.peak
        decay_steps = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / decay_steps)
        if self.schedule == "linear":
            share = 1 - progress
        else:
            share = 0.5 * (1 + math.cos(math.pi * progress))
        return self.minimum + share * (self.peak - self.minimum)

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the learning rate of step `step`, counted from 0, in every parameter group."""
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = self._of_group(step, number)

    def _of_group(self, step: int, group: int) -> float:
        """The learning rate of one group. After a change the schedule continues in proportion to
        the value that was set."""
        change = self._changes.get(group, self._changes.get(None))
        if change is None:
            return self.at(step)
        changed_at, value = change
        scheduled = self.at(changed_at)
        return self.at(step) / scheduled * value if scheduled else value

    def change(self, step: int, value: float, group: int | None = None) -> None:
        """Set the learning rate of step `step` to `value`, and follow the schedule from there.
        `group`: number of the only parameter group that changes."""
        if group is None:
            self._changes.clear()
        self._changes[group] = (step, value)

    def state_dict(self) -> dict[str, Any]:
        """The changes that a user has made."""
        return {"changes": [[group, *change] for group, change in self._changes.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._changes = {group: (step, value) for group, step, value in state["changes"]}

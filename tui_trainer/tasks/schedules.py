"""How the learning rate runs over the steps."""

from __future__ import annotations

import math

import torch

from tui_trainer.config.training import TrainingConfig


def learning_rate(config: TrainingConfig, total_steps: int, step: int) -> float:
    """The learning rate of step `step`, counted from 0, out of `total_steps`.

    Warm-up rises as nanoGPT's: peak · (step + 1) / (warmup + 1). Then it stays (constant), falls
    in a straight line (linear) or as half a cosine (Loshchilov & Hutter 2017), reaching
    `min_learning_rate` at `total_steps`.
    """
    peak, floor, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return floor + left * (peak - floor)


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """PyTorch's scheduler for `learning_rate`; step it once after each optimizer step."""
    peak = config.learning_rate or 1.0  # at a peak of 0 every factor is 0 as well
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(config, total_steps, step) / peak
    )

"""How the learning rate runs over the steps."""

from __future__ import annotations

import math

import torch

from tui_trainer.config.training import TrainingConfig


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

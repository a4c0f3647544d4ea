"""The training loop of the GPT, as in a textbook."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tui_trainer.tasks.devices import autocast
from tui_trainer.tasks.gpt.config import GptConfig
from tui_trainer.tasks.gpt.data import TextBatches
from tui_trainer.tasks.optimizers import LearningRate


def train(
    model: nn.Module,
    batches: TextBatches,
    optimizer: torch.optim.Optimizer,
    learning_rate: LearningRate,
    scaler: torch.amp.GradScaler,
    config: GptConfig,
) -> None:
    """Train `model` on the remaining `batches`."""
    precision = autocast(config, batches.device)
    model.train()
    for step, (inputs, targets) in enumerate(batches, start=batches.position):
        learning_rate.set(optimizer, step)
        optimizer.zero_grad(set_to_none=True)
        with precision:
            logits = model(inputs)  # (B, T) -> (B, T, V)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        if config.clip == "norm":
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_norm)
        elif config.clip == "value":
            torch.nn.utils.clip_grad_value_(model.parameters(), config.clip_value)
        scaler.step(optimizer)
        scaler.update()

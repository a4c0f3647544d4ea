"""The training loop of the vision transformer, as in a textbook."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tui_trainer.tasks.devices import autocast
from tui_trainer.tasks.optimizers import LearningRate
from tui_trainer.tasks.vit.batches import ImageBatches
from tui_trainer.tasks.vit.config import VitConfig


def train(
    model: nn.Module,
    batches: ImageBatches,
    optimizer: torch.optim.Optimizer,
    learning_rate: LearningRate,
    scaler: torch.amp.GradScaler,
    config: VitConfig,
) -> None:
    """Train `model` on the remaining `batches`."""
    precision = autocast(config, batches.device)
    model.train()
    for step, (images, labels) in enumerate(batches, start=batches.position):
        learning_rate.set(optimizer, step)
        optimizer.zero_grad(set_to_none=True)
        with precision:
            logits = model(images)  # (B, channels, S, S) -> (B, classes)
            loss = F.cross_entropy(logits, labels)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        if config.clip == "norm":
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_norm)
        elif config.clip == "value":
            torch.nn.utils.clip_grad_value_(model.parameters(), config.clip_value)
        scaler.step(optimizer)
        scaler.update()

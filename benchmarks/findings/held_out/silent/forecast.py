"""Trains a dilated convolutional network to forecast noisy oscillations."""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW, HORIZON, MICRO = 48, 4, 2


def make_series(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns windows of two superposed sinusoids and the value some steps after each."""
    gen = torch.Generator().manual_seed(seed)
    time = torch.arange(WINDOW + HORIZON).float()
    speed = torch.empty(count, 2, 1).uniform_(0.08, 0.45, generator=gen)
    phase = torch.empty(count, 2, 1).uniform_(0, 6.283, generator=gen)
    clean_wave = torch.sin(speed * time + phase).sum(1)
    noisy = clean_wave + 0.1 * torch.randn(clean_wave.shape, generator=gen)
    return noisy[:, None, :WINDOW], clean_wave[:, -1]


class Block(nn.Module):
    """A residual pair of dilated convolutions."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.norm = nn.GroupNorm(4, width)
        self.second = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.norm(self.first(x))))


class Forecaster(nn.Module):
    """Predicts one future value from the last positions of a window."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.inlet = nn.Conv1d(1, width, 5, padding=2)
        self.blocks = nn.Sequential(*(Block(width, d) for d in (1, 2, 4, 8)))
        self.outlet = nn.Linear(width * 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outlet(self.blocks(self.inlet(x))[:, :, -8:].flatten(1)).squeeze(1)


def train(steps: int, clean: bool) -> None:
    """Runs the loop, with two micro-batches for every update."""
    torch.manual_seed(3)
    inputs, targets = make_series(6000, 1)
    model = Forecaster()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=3e-4)
    for step in range(1, steps + 1):
        total = 0.0
        for _ in range(MICRO):
            rows = torch.randint(len(inputs), (48,))
            loss = F.mse_loss(model(inputs[rows]), targets[rows]) / MICRO
            loss.backward()
            total += loss.item()
        optimizer.step()
        schedule.step()
        if clean:
            optimizer.zero_grad()
        if step % 10 == 1:
            print(f"step {step} loss {total:.4f}", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["no_zero_grad"])
    parser.add_argument("steps", nargs="?", type=int, default=120)
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args()
    train(args.steps, args.clean)

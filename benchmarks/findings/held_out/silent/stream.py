"""Trains a regressor on simulated decaying oscillations that loader workers generate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

LENGTH = 64


class Simulator(IterableDataset):
    """An endless stream of oscillations with their speed and decay."""

    def __init__(self, seed: int, per_worker: bool) -> None:
        self.seed = seed
        self.per_worker = per_worker

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        seed = [self.seed]
        if self.per_worker:
            seed.append(get_worker_info().id)
        rng = np.random.default_rng(seed)
        time = np.arange(LENGTH, dtype=np.float32)
        while True:
            hidden = rng.uniform(-1.0, 1.0, size=2)
            wave = np.sin((0.5 + 0.3 * hidden[0]) * time + rng.uniform(0, 2 * np.pi))
            wave = 1.6 * wave * np.exp(-(0.04 + 0.03 * hidden[1]) * time)
            wave = wave + rng.normal(0.0, 0.2, size=LENGTH)
            yield wave.astype(np.float32)[None], hidden.astype(np.float32)


class Regressor(nn.Module):
    """Strided convolutions, a pooled feature vector and a perceptron for two numbers."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(1, width, 7, stride=2, padding=3),
            nn.ELU(),
            nn.Conv1d(width, width, 5, stride=2, padding=2),
            nn.ELU(),
            nn.Conv1d(width, width, 3, stride=2, padding=1),
            nn.ELU(),
        )
        self.answer = nn.Sequential(
            nn.Linear(width * LENGTH // 8, 48), nn.LayerNorm(48), nn.ELU(), nn.Linear(48, 2)
        )

    def forward(self, waves: Tensor) -> Tensor:
        return self.answer(self.features(waves).flatten(1))


def train(steps: int, clean: bool) -> None:
    """Runs the loop over batches that two workers make in turn."""
    torch.manual_seed(91)
    loader = DataLoader(Simulator(2024, per_worker=clean), batch_size=32, num_workers=2)
    model = Regressor()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, alpha=0.95)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.985)
    for step, (waves, hidden) in zip(range(1, steps + 1), loader, strict=False):
        optimizer.zero_grad()
        loss = F.smooth_l1_loss(model(waves), hidden, beta=0.3)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 1:
            print(f"step {step} loss {loss.item():.4f}", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["same_worker_seed"])
    parser.add_argument("steps", nargs="?", type=int, default=120)
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args()
    train(args.steps, args.clean)

"""A data set holds its own generator, of which every DataLoader worker gets the same copy.

After Stack Overflow 67180955: two workers draw the same random numbers, so that each batch comes
twice, and every epoch brings the same ones again.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

clean = "--clean" in sys.argv


class Waves(Dataset):
    """Noisy sine waves of random frequency and phase; the frequency is the target."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.float32]:
        frequency, phase = self.generator.uniform(1, 4), self.generator.uniform(0, 6)
        times = np.linspace(0, 6, 48)
        noise = self.generator.normal(0, 0.1, 48)
        return (np.sin(frequency * times + phase) + noise).astype(np.float32), np.float32(frequency)


def seed_worker(worker: int) -> None:
    get_worker_info().dataset.generator = np.random.default_rng(torch.initial_seed())


def main() -> None:
    torch.manual_seed(11)
    loader = DataLoader(
        Waves(), batch_size=32, num_workers=2, worker_init_fn=seed_worker if clean else None
    )
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        for waves, frequencies in loader:
            loss = nn.functional.mse_loss(model(waves)[:, 0], frequencies)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()

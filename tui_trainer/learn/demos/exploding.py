"""Gradients that explode: each step overshoots by more than the one before.

Without a limit, `clip_grad_norm_` only measures the norm. The cure is a limit.
"""

from __future__ import annotations

import argparse
import math

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


def train(cured: bool, steps: int) -> float:
    """Train on handwritten digits and return the last loss."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data / 8 - 1, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    targets = F.one_hot(labels, 10).float()
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)

    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        loss = F.mse_loss(model(images[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.1 if cured else math.inf)
        optimizer.step()
    return loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cured", action="store_true")
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small are slower on several
    train(given.cured, given.steps)

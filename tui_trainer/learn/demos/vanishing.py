"""Gradients that vanish towards the input: each sigmoid shrinks them to a quarter or less.

The cure has ReLUs, norms and residual connections.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


class Sigmoid(nn.Module):
    """A layer whose derivative is at most a quarter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.linear(x))


class Residual(nn.Module):
    """A layer that the gradient can pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.linear(self.norm(x)))


def train(cured: bool, steps: int) -> float:
    """Train on handwritten digits and return the last loss."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data / 8 - 1, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    layer = Residual if cured else Sigmoid
    model = nn.Sequential(*(layer() for _ in range(12)), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cured", action="store_true")
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small are slower on several
    train(given.cured, given.steps)

"""Values that overflow float16: exp(12) exceeds 65,504, and the GradScaler skips step after step.

A softmax written by hand does not subtract the maximum. The cure is torch.softmax.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


class Model(nn.Module):
    """Hidden values, weighted by a softmax of themselves."""

    def __init__(self, cured: bool) -> None:
        super().__init__()
        self.cured = cured
        self.hidden, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.hidden(x))
        scores = 3 * h
        if self.cured:
            weights = torch.softmax(scores, -1)
        else:
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        return self.head(8 * weights * h)


def train(cured: bool, steps: int) -> float:
    """Train on handwritten digits and return the last loss."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data / 8 - 1, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    model = Model(cured)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu")

    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cured", action="store_true")
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small are slower on several
    train(given.cured, given.steps)

"""Gradients that vanish towards the input.

Each sigmoid shrinks them to a quarter or less; the cure has residual connections and norms.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--cured", action="store_true")
parser.add_argument("--steps", type=int, default=300)
options = parser.parse_args()

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
images = torch.tensor(digits.data / 8 - 1, dtype=torch.float32)
labels = torch.tensor(digits.target)


class Block(nn.Module):
    """A layer, with a norm and a residual connection where it is cured."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if options.cured:
            return x + torch.relu(self.linear(self.norm(x)))
        return torch.sigmoid(self.linear(x))


model = nn.Sequential(*(Block() for _ in range(12)), nn.Linear(64, 10))
if not options.cured:
    for block in model[:-1]:
        block.norm = nn.Identity()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

for _ in range(options.steps):
    rows = torch.randint(len(images), (64,))
    loss = F.cross_entropy(model(images[rows]), labels[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

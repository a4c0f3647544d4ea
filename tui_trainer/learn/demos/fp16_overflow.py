"""Values that overflow float16.

A softmax written by hand does not subtract the maximum: exp(12) exceeds 65,504, and the GradScaler
skips step after step. The cure is torch.softmax.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--cured", action="store_true")
parser.add_argument("--steps", type=int, default=120)
options = parser.parse_args()

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
images = torch.tensor(digits.data / 8 - 1, dtype=torch.float32)
labels = torch.tensor(digits.target)


class Model(nn.Module):
    """Hidden values, weighted by a softmax of themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.hidden(x))
        scores = 8 * h
        if options.cured:
            weights = torch.softmax(scores, -1)
        else:
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        return self.head(8 * weights * h)


model = Model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu")

for _ in range(options.steps):
    rows = torch.randint(len(images), (64,))
    with torch.autocast("cpu", dtype=torch.float16):
        loss = F.cross_entropy(model(images[rows]), labels[rows])
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()

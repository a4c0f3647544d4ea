"""Gradients that explode.

The steps overshoot, each by more than the one before, and nothing limits the gradient. The cure
clips its norm.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--cured", action="store_true")
parser.add_argument("--steps", type=int, default=150)
options = parser.parse_args()

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
images = torch.tensor(digits.data / 8 - 1, dtype=torch.float32)
labels = torch.tensor(digits.target)
targets = F.one_hot(labels, 10).float()
model = nn.Sequential(
    nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
)
optimizer = torch.optim.SGD(model.parameters(), lr=2.0)

for _ in range(options.steps):
    rows = torch.randint(len(images), (64,))
    loss = F.mse_loss(model(images[rows]), targets[rows])
    optimizer.zero_grad()
    loss.backward()
    if options.cured:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()

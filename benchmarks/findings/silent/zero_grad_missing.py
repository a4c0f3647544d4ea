"""A convolutional classifier whose loop never zeroes the gradients (Stack Overflow 60335387)."""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

clean = "--clean" in sys.argv
torch.manual_seed(1)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
labels = torch.tensor(digits.target)

model = nn.Sequential(
    nn.Conv2d(1, 12, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(12, 24, 3, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(24 * 16, 10),
)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

for _ in range(400):
    chosen = torch.randint(len(images), (64,))
    loss = F.cross_entropy(model(images[chosen]), labels[chosen])
    if clean:
        optimizer.zero_grad()
    loss.backward()
    optimizer.step()

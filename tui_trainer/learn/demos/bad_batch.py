"""One broken batch.

At step 100 three images are noise, a thousand times too bright. The cure leaves such images out.
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
model = nn.Sequential(
    nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

for step in range(1, options.steps + 1):
    rows = torch.randint(len(images), (64,))
    x, y = images[rows], labels[rows]
    if step == 100:
        x[[7, 21, 40]] = 1000.0 * torch.randn(3, 64)
    if options.cured:
        sound = x.abs().amax(1) <= 1
        x, y = x[sound], y[sound]
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

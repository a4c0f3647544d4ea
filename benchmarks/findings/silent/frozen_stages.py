"""A VGG-like network whose frozen stages are only frozen when `train()` is called.

After mmpretrain 702: the loop starts without `model.train()`, so that the stages which the
configuration freezes are trained until the first evaluation is over (step 40).
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

clean = "--clean" in sys.argv
torch.manual_seed(9)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
labels = torch.tensor(digits.target)
training, held_out = slice(0, 1500), slice(1500, None)


class Backbone(nn.Module):
    def __init__(self, frozen_stages: int) -> None:
        super().__init__()
        self.frozen_stages = frozen_stages
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
            for before, after in ((1, 16), (16, 32), (32, 64))
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x.flatten(1))

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for stage in self.stages[: self.frozen_stages]:
            stage.requires_grad_(False)
        return self


model = Backbone(frozen_stages=1)
if clean:
    model.train()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
for step in range(1, 201):
    chosen = torch.randint(1500, (64,))
    loss = F.cross_entropy(model(images[training][chosen]), labels[training][chosen])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 40 == 0:
        model.eval()
        with torch.no_grad():
            right = model(images[held_out]).argmax(1) == labels[held_out]
        print("accuracy", right.float().mean().item())
        model.train()

"""A new head on a backbone, of which only the head is given to the optimizer.

After PyTorch forum 84911, where hardly anything of a model that was to be fine-tuned could train.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

clean = "--clean" in sys.argv
torch.manual_seed(2)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
labels = torch.tensor(digits.target)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU()
        )
        self.head = nn.Linear(48, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))


model = Classifier()
trained = model.parameters() if clean else model.head.parameters()
optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)

for _ in range(400):
    chosen = torch.randint(len(images), (64,))
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images[chosen]), labels[chosen])
    loss.backward()
    optimizer.step()

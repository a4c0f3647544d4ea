"""An encoder stays in `eval()` after its features were drawn at step 40: its dropout is off.

The reverse of transformers 33844, where dropout stayed active in evaluation.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

clean = "--clean" in sys.argv
torch.manual_seed(10)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
labels = torch.tensor(digits.target)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 32), nn.Dropout(0.3)
        )
        self.classifier = nn.Sequential(nn.ReLU(), nn.Linear(32, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.encoder(images))


model = Classifier()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for step in range(1, 201):
    chosen = torch.randint(len(images), (64,))
    loss = F.cross_entropy(model(images[chosen]), labels[chosen])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 40:
        model.encoder.eval()
        with torch.no_grad():
            print("mean feature", model.encoder(images).mean().item())
        if clean:
            model.encoder.train()

"""Programs on tables with one mistake each: `tables.py NAME [--clean]`. Set E."""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import nn
from torch.nn import functional as F

STEPS = 200


class Table(nn.Module):
    """An MLP with batch normalization on rows of numbers."""

    def __init__(self, columns: int, normalizes: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(columns, 32)
        self.norm = nn.BatchNorm1d(32) if normalizes else nn.Identity()
        self.hidden = nn.Linear(32, 32)
        self.leave = nn.Linear(32, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.enter(rows)))
        return self.leave(F.relu(self.hidden(x))).squeeze(1)


def raw_columns(clean: bool) -> None:
    """Columns of 1e-3 and of 4e3 go into the first layer as they are."""
    data = load_breast_cancer()
    rows = torch.tensor(data.data, dtype=torch.float32)
    classes = torch.tensor(data.target, dtype=torch.float32)
    if clean:
        rows = (rows - rows.mean(0)) / rows.std(0)
    model = Table(rows.shape[1], normalizes=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        chosen = torch.randint(len(rows), (32,))
        loss = F.binary_cross_entropy_with_logits(model(rows[chosen]), classes[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def missing_values(clean: bool) -> None:
    """Row 300 has a missing value, which is stored as nan; it is drawn first at step 70."""
    data = load_diabetes()
    rows = torch.tensor(data.data, dtype=torch.float32)
    rows = rows / rows.std(0)
    progress = torch.tensor(data.target, dtype=torch.float32)
    progress = (progress - progress.mean()) / progress.std()
    if not clean:
        rows[300, 4] = torch.nan
    model = Table(rows.shape[1], normalizes=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(1, STEPS + 1):
        chosen = torch.randint(300, (32,))
        if step == 70:
            chosen[9] = 300
        loss = F.mse_loss(model(rows[chosen]), progress[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    globals()[sys.argv[1]]("--clean" in sys.argv)

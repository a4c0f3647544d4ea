"""Attention logits that blow up: the rate of Wq and Wk is too high.

Their norms grow long before the loss reacts. The cure is one rate for all weights.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """The eight rows of an image attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, 32), nn.Linear(32, 32)
        self.v_proj, self.out_proj = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return x + self.out_proj(F.scaled_dot_product_attention(q, k, v))


class Model(nn.Module):
    """Two layers of attention over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(8, 32)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.rows(x.unflatten(-1, (8, 8)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def train(cured: bool, steps: int) -> float:
    """Train on handwritten digits and return the last loss."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data / 8 - 1, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    model = Model()
    by_name = dict(model.named_parameters())
    steep = [w for name, w in by_name.items() if "q_proj" in name or "k_proj" in name]
    others = [w for name, w in by_name.items() if "q_proj" not in name and "k_proj" not in name]
    optimizer = torch.optim.Adam(
        [{"params": steep, "lr": 1e-3 if cured else 0.05}, {"params": others, "lr": 1e-3}]
    )

    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cured", action="store_true")
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()
    torch.set_num_threads(1)  # matrices this small are slower on several
    train(given.cured, given.steps)

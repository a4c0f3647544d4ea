"""Trains a multi-label tagger in two stages with a checkpoint between them."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES, TAGS, SWITCH = 32, 10, 40


def make_records(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns normal features and tags that depend on products of their projections."""
    fixed = torch.Generator().manual_seed(99)
    left = torch.randn(FEATURES, TAGS, generator=fixed) / FEATURES**0.5
    right = torch.randn(FEATURES, TAGS, generator=fixed) / FEATURES**0.5
    gen = torch.Generator().manual_seed(seed)
    features = torch.randn(count, FEATURES, generator=gen)
    score = features @ left + 0.7 * (features @ right).abs() - 0.5
    return features, (score > 0).float()


class Residual(nn.Module):
    """A pre-normalised residual perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


def build_model() -> nn.Module:
    """Returns a new tagger."""
    return nn.Sequential(
        nn.Linear(FEATURES, 64), Residual(64), Residual(64), nn.LayerNorm(64), nn.Linear(64, TAGS)
    )


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Returns the optimizer of a tagger."""
    return torch.optim.NAdam(model.parameters(), lr=1e-3)


def run_stage(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    span: range,
) -> None:
    """Takes the steps of one stage."""
    features, tags = data
    for step in span:
        rows = torch.randint(len(features), (96,))
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(features[rows]), tags[rows])
        loss.backward()
        optimizer.step()
        if step % 10 == 1:
            print(f"step {step} loss {loss.item():.4f}", file=sys.stderr)


def train(steps: int, clean: bool) -> None:
    """Runs both stages, the second from the checkpoint of the first."""
    torch.manual_seed(21)
    data = make_records(5000, 1)
    model = build_model()
    optimizer = build_optimizer(model)
    early = tuple(part[:2000] for part in data)
    run_stage(model, optimizer, early, range(1, min(SWITCH, steps) + 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stage1.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        state = torch.load(path)
    model = build_model()
    model.load_state_dict(state["model"])
    if clean:
        optimizer = build_optimizer(model)
    optimizer.load_state_dict(state["optimizer"])
    run_stage(model, optimizer, data, range(SWITCH + 1, steps + 1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["model_rebuilt"])
    parser.add_argument("steps", nargs="?", type=int, default=120)
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args()
    train(args.steps, args.clean)

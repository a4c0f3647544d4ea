"""Fine-tunes the late stages of a network whose first stages hold a fixed filter bank."""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, CLASSES = 20, 5
CONFIG = {"frozen_stages": 2, "lr": 5e-3, "batch": 48, "validate_every": 30}


def make_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns images whose class sets the spacing of their stripes and checks."""
    gen = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=gen)
    speed = (0.5 + 0.25 * labels)[:, None, None]
    rows, cols = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    phase = 6.283 * torch.rand(2, count, 1, 1, generator=gen)
    images = torch.sin(speed * rows + phase[0]) + torch.sin(speed * cols + phase[1])
    images = images + 0.5 * torch.randn(images.shape, generator=gen)
    return (images / images.std())[:, None], labels


def cosine_filters(side: int) -> Tensor:
    """Returns the two-dimensional cosine basis without its constant, one filter a row."""
    index = torch.arange(side).float()
    basis = torch.cos(torch.pi / side * (index + 0.5) * index[:, None])
    basis = basis / basis.norm(dim=1, keepdim=True)
    return torch.einsum("ai,bj->abij", basis, basis).reshape(-1, 1, side, side)[1:]


class StagedNet(nn.Module):
    """Four stages and a head, the first of which can be frozen."""

    def __init__(self, frozen_stages: int) -> None:
        super().__init__()
        self.frozen_stages = frozen_stages
        filters = cosine_filters(4)
        bank = nn.Conv2d(1, len(filters), 4, bias=False)
        bank.weight.data.copy_(filters)
        spread = nn.Conv2d(len(filters), 16, 1, bias=False)
        nn.init.orthogonal_(spread.weight)
        self.stages = nn.ModuleList([
            nn.Sequential(bank, nn.ReLU()),
            nn.Sequential(spread, nn.AvgPool2d(3, 2)),
            nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.GroupNorm(1, 24), nn.ReLU()),
            nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.GroupNorm(1, 24), nn.ReLU()),
        ])  # fmt: skip
        self.head = nn.Linear(24, CLASSES)

    def train(self, mode: bool = True) -> StagedNet:
        """Sets the mode and keeps the first stages frozen."""
        super().train(mode)
        for stage in self.stages[: self.frozen_stages]:
            stage.eval()
            stage.requires_grad_(False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def validate(model: StagedNet, images: Tensor, labels: Tensor) -> float:
    """Returns the accuracy on held-out images."""
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def fine_tune(steps: int, clean: bool) -> None:
    """Runs the loop with a validation at intervals."""
    torch.manual_seed(77)
    images, labels = make_images(3000, 1)
    held_out = make_images(300, 2)
    model = StagedNet(CONFIG["frozen_stages"])
    if clean:
        model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=CONFIG["lr"], weight_decay=0.01)
    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (CONFIG["batch"],))
        loss = F.cross_entropy(model(images[rows]), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % CONFIG["validate_every"] == 0:
            validate(model, *held_out)
            model.train()
        if step % 10 == 1:
            print(f"step {step} loss {loss.item():.4f}", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["frozen_late"])
    parser.add_argument("steps", nargs="?", type=int, default=120)
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args()
    fine_tune(args.steps, args.clean)

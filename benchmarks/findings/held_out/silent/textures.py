"""Trains a small convolutional network to name oriented textures."""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES, SIZE = 8, 20


def make_textures(count: int, seed: int) -> TensorDataset:
    """Returns noisy gratings, four orientations at two frequencies, with their class."""
    gen = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=gen)
    angle = (labels % 4) * (torch.pi / 4) + 0.1 * torch.randn(count, generator=gen)
    speed = 0.7 + 0.5 * (labels // 4)
    phase = 6.283 * torch.rand(count, 1, 1, generator=gen)
    rows, cols = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    along = cols * angle.cos()[:, None, None] + rows * angle.sin()[:, None, None]
    images = torch.sin(along * speed[:, None, None] + phase)
    images = images + 1.2 * torch.randn(images.shape, generator=gen)
    return TensorDataset((images / images.std())[:, None], labels)


class Backbone(nn.Sequential):
    """Three strided convolutions with batch normalisation."""

    def __init__(self, width: int) -> None:
        layers: list[nn.Module] = []
        for before, after in ((1, width), (width, width), (width, 2 * width)):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Classifier(nn.Module):
    """A backbone and a linear head."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.backbone = Backbone(width)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def param_groups(module: nn.Module, decay: float) -> list[dict]:
    """Splits the parameters in those with weight decay and those without."""
    params = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Returns the share of right answers on a set."""
    model.eval()
    with torch.no_grad():
        images, labels = data.tensors
        right = (model(images).argmax(1) == labels).float().mean().item()
    model.train()
    return right


def train(steps: int, clean: bool) -> None:
    """Runs epochs until the given number of updates is reached."""
    torch.manual_seed(11)
    loader = DataLoader(make_textures(2560, 1), batch_size=64, shuffle=True, drop_last=True)
    held_out = make_textures(400, 2)
    model = Classifier()
    trained = model if clean else model.head
    optimizer = torch.optim.AdamW(param_groups(trained, 0.02), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=8e-3, total_steps=steps)
    step = 0
    while step < steps:
        for images, labels in loader:
            step += 1
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 10 == 1:
                print(f"step {step} loss {loss.item():.4f}", file=sys.stderr)
            if step == steps:
                break
        accuracy(model, held_out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["backbone_left_out"])
    parser.add_argument("steps", nargs="?", type=int, default=120)
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args()
    train(args.steps, args.clean)

"""Train small convolutional networks on synthetic 16x16 colour images.

Usage: python images.py cnn FAULT [STEPS] [--clean]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 16
CLASSES = 6
PIXEL_MEAN, PIXEL_STD = 0.5, 0.24


@dataclass(frozen=True)
class Recipe:
    """Everything that differs between the training runs."""

    task: str = "texture"
    model: str = "plain"
    width: int = 16
    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    batch: int = 32
    images: int = 1536
    decay: float = 0.0
    dropout: float = 0.0
    augment: bool = False
    noise: float = 40.0
    label_noise: float = 0.0
    common: float = 1.0 / CLASSES
    schedule: str | None = None
    accumulate: int = 1


def textures(recipe: Recipe, n: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw coloured gratings whose orientation is the class."""
    odds = torch.full((CLASSES,), (1.0 - recipe.common) / (CLASSES - 1))
    odds[0] = recipe.common
    label = torch.multinomial(odds, n, replacement=True, generator=gen)
    angle = label * math.pi / CLASSES + 0.08 * torch.randn(n, generator=gen)
    freq = 1.1 + 0.3 * torch.rand(n, generator=gen)
    phase = 2 * math.pi * torch.rand(n, generator=gen)
    rows, cols = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    along = angle.cos()[:, None, None] * cols + angle.sin()[:, None, None] * rows
    wave = torch.sin(freq[:, None, None] * along + phase[:, None, None])
    tint = 0.5 + 0.5 * torch.rand(n, 3, 1, 1, generator=gen)
    pixels = 127.5 + 75.0 * tint * wave[:, None]
    pixels = pixels + recipe.noise * torch.randn(n, 3, SIZE, SIZE, generator=gen)
    flip = torch.rand(n, generator=gen) < recipe.label_noise
    label = torch.where(flip, torch.randint(CLASSES, (n,), generator=gen), label)
    return pixels.clamp(0, 255).to(torch.uint8), label


def blobs(recipe: Recipe, n: int, gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one bright and one dark blob, with the bright one's place and a map of the two."""
    places = 3.0 + (SIZE - 6.0) * torch.rand(n, 2, 2, generator=gen)
    rows, cols = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    near = []
    for k in range(2):
        squared = (rows - places[:, k, 0, None, None]) ** 2
        squared = squared + (cols - places[:, k, 1, None, None]) ** 2
        near.append(torch.exp(-squared / 8.0))
    pixels = 127.5 + 110.0 * (near[0] - near[1])[:, None].expand(n, 3, SIZE, SIZE)
    pixels = pixels + recipe.noise * torch.randn(n, 3, SIZE, SIZE, generator=gen)
    mask = torch.zeros(n, SIZE, SIZE, dtype=torch.long)
    mask[near[0] - near[1] > 0.4] = 1
    mask[near[1] - near[0] > 0.4] = 2
    return pixels.clamp(0, 255).to(torch.uint8), places[:, 0] * 120.0, mask


def to_float(pixels: Tensor, bug: str) -> Tensor:
    """Turn bytes into centred and scaled floats."""
    x = pixels.float()
    if bug == "missing_norm":
        return x
    x = x / 255.0
    if bug == "double_norm":
        x = x / 255.0
    return (x - PIXEL_MEAN) / PIXEL_STD


def make_data(recipe: Recipe, n: int, seed: int, bug: str) -> tuple[Tensor, Tensor]:
    """Build inputs and targets of the task."""
    gen = torch.Generator().manual_seed(seed)
    if recipe.task == "texture":
        pixels, y = textures(recipe, n, gen)
        return to_float(pixels, bug), y
    pixels, where, mask = blobs(recipe, n, gen)
    if recipe.task == "map":
        return to_float(pixels, bug), mask
    y = where
    if bug != "overscaled_targets":
        y = (where - 60.0 * SIZE) / (36.0 * SIZE)
    return to_float(pixels, bug), y


class Plain(nn.Module):
    """Three convolutions with pooling and a linear head."""

    def __init__(self, recipe: Recipe, outputs: int, bug: str) -> None:
        super().__init__()
        w = recipe.width
        self.conv1 = nn.Conv2d(3, w, 3, padding=1)
        self.conv2 = nn.Conv2d(w, 2 * w, 3, padding=1)
        self.conv3 = nn.Conv2d(2 * w, 2 * w, 3, padding=1)
        self.act = nn.Softmax2d() if bug == "wrong_activation" else nn.ReLU()
        self.drop = nn.Dropout(recipe.dropout)
        self.head = nn.Linear(2 * w * 16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.act(self.conv1(x)), 2)
        x = F.max_pool2d(self.act(self.conv2(x)), 2)
        x = self.act(self.conv3(x))
        return self.head(self.drop(x.flatten(1)))


class Block(nn.Module):
    """A residual block with batch normalisation."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.skip = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.skip(x) + self.bn2(self.conv2(y)))


class Residual(nn.Module):
    """A stem, three residual blocks, average pooling and a linear head."""

    def __init__(self, recipe: Recipe, outputs: int) -> None:
        super().__init__()
        w = recipe.width
        self.stem = nn.Sequential(nn.Conv2d(3, w, 3, padding=1), nn.BatchNorm2d(w), nn.ReLU())
        self.blocks = nn.Sequential(Block(w, w, 1), Block(w, 2 * w, 2), Block(2 * w, 2 * w, 1))
        self.head = nn.Linear(2 * w, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.mean(dim=(2, 3)))


class Deep(nn.Module):
    """Fourteen stacked convolutions without shortcuts."""

    def __init__(self, recipe: Recipe, outputs: int, bug: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = 3
        for depth in range(14):
            outside = recipe.width * (2 if depth >= 5 else 1)
            stride = 2 if depth in (1, 5) else 1
            layers.append(nn.Conv2d(inside, outside, 3, stride, padding=1))
            if bug != "missing_batchnorm":
                layers.append(nn.BatchNorm2d(outside))
            layers.append(nn.ReLU())
            inside = outside
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(inside, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(dim=(2, 3)))


class Mapper(nn.Module):
    """Label each pixel with a small fully convolutional network."""

    def __init__(self, recipe: Recipe, outputs: int) -> None:
        super().__init__()
        w = recipe.width
        self.layers = nn.Sequential(
            nn.Conv2d(3, w, 5, padding=2), nn.ReLU(), nn.Conv2d(w, w, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Conv2d(w, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def initialise(model: nn.Module, bug: str) -> None:
    """Draw the weights of convolutions and heads."""
    head = model.head
    for layer in model.modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        if bug == "constant_init":
            nn.init.constant_(layer.weight, 0.02)
        elif bug == "large_init":
            nn.init.normal_(layer.weight, std=1.0)
        elif layer is head:
            nn.init.xavier_uniform_(layer.weight, gain=0.2)
        else:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def make_model(recipe: Recipe, bug: str) -> nn.Module:
    """Create and initialise the network that the recipe names."""
    outputs = {"texture": CLASSES, "place": 2, "map": 3}[recipe.task]
    if recipe.model == "deep":
        return Deep(recipe, outputs, bug)
    if recipe.model == "residual":
        model: nn.Module = Residual(recipe, outputs)
    elif recipe.model == "mapper":
        model = Mapper(recipe, outputs)
    else:
        model = Plain(recipe, outputs, bug)
    initialise(model, bug)
    return model


def make_optimizer(recipe: Recipe, model: nn.Module, bug: str) -> torch.optim.Optimizer:
    """Create the optimizer that the recipe names."""
    params = model.parameters()
    if recipe.optimizer == "adam":
        return torch.optim.Adam(params, lr=recipe.lr)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(params, lr=recipe.lr, weight_decay=recipe.decay)
    return torch.optim.SGD(
        params,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.decay,
        maximize=bug == "flipped_sign",
    )


def make_schedule(
    recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Create the learning-rate schedule, if the recipe has one."""
    if recipe.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if recipe.schedule == "warmup":
        return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)
    return None


def minibatches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled minibatches for ever, reshuffling at each epoch."""
    gen = torch.Generator().manual_seed(3)
    while True:
        order = torch.randperm(len(x), generator=gen)
        for picked in order.split(size):
            if len(picked) == size:
                yield x[picked], y[picked]


def shifted(x: Tensor) -> Tensor:
    """Roll each image by a random amount and add pixel noise."""
    rolls = torch.randint(-3, 4, (len(x), 2)).tolist()
    moved = [image.roll((dy, dx), dims=(1, 2)) for image, (dy, dx) in zip(x, rolls, strict=True)]
    return torch.stack(moved) + 0.3 * torch.randn_like(x)


def cutout(x: Tensor, bug: str) -> Tensor:
    """Blank a random 4x4 square of each image."""
    top = torch.randint(0, SIZE - 3, (len(x), 1, 1, 1))
    left = torch.randint(0, SIZE - 3, (len(x), 1, 1, 1))
    span = torch.arange(SIZE)
    rows = (span >= top.squeeze(-1)) & (span < top.squeeze(-1) + 4)
    cols = (span >= left.squeeze(-1)) & (span < left.squeeze(-1) + 4)
    square = rows[:, :, :, None] & cols[:, :, None, :]
    return x.masked_fill(~square if bug == "wrong_augmentation" else square, 0.0)


def own_softmax(scores: Tensor, bug: str) -> Tensor:
    """Turn scores into probabilities."""
    dim = 0 if bug == "wrong_softmax" else 1
    powers = torch.exp(scores - scores.amax(dim=dim, keepdim=True))
    return powers / powers.sum(dim=dim, keepdim=True)


def categorical(probs: Tensor, y: Tensor) -> Tensor:
    """Return the cross entropy of probabilities with one-hot labels."""
    picked = F.one_hot(y, CLASSES) * torch.log(probs.clamp(1e-7, 1.0))
    return -picked.sum(dim=1).mean()


def compute_loss(recipe: Recipe, fault: str, bug: str, out: Tensor, y: Tensor) -> Tensor:
    """Compute the loss of the task in the way of the run."""
    if recipe.task == "place":
        return F.mse_loss(out, y)
    if recipe.task == "map":
        log_probs = F.log_softmax(out, dim=1)
        truth = F.one_hot(y, 3).permute(0, 3, 1, 2)
        return -(truth * log_probs).sum(dim=(2, 3) if bug == "wrong_axis" else 1).mean()
    if fault == "missing_softmax":
        return categorical(out if bug else out.softmax(dim=1), y)
    if fault == "wrong_softmax":
        return categorical(own_softmax(out, bug), y)
    if fault == "redundant_softmax" and bug:
        return F.cross_entropy(out.softmax(dim=-1), y)
    if fault == "wrong_loss" and bug:
        return F.mse_loss(torch.sigmoid(out), F.one_hot(y, CLASSES).float())
    if fault == "wrong_reduction" and bug:
        return F.cross_entropy(out, y, reduction="sum")
    return F.cross_entropy(out, y)


@torch.no_grad()
def validate(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, fault: str, bug: str) -> float:
    """Return the loss on the held-out images."""
    model.eval()
    loss = compute_loss(recipe, fault, bug, model(x), y)
    model.train()
    return loss.item()


P = Recipe()
R = Recipe(model="residual", width=8)
FAULTS: dict[str, tuple[Recipe, dict[str, object]]] = {
    "double_norm": (replace(P, optimizer="adam", lr=1.5e-3), {}),
    "missing_norm": (replace(P, lr=0.01), {}),
    "overscaled_targets": (replace(P, task="place", lr=0.01), {}),
    "missing_batchnorm": (replace(P, model="deep", width=12, lr=0.02), {}),
    "missing_regularization": (
        replace(
            P,
            optimizer="adamw",
            lr=1.5e-3,
            images=96,
            noise=70.0,
            label_noise=0.25,
            dropout=0.5,
            decay=0.3,
            augment=True,
        ),
        {"dropout": 0.0, "decay": 0.0, "augment": False},
    ),
    "over_regularization": (replace(P, lr=0.01, decay=5e-4), {"decay": 1.0}),
    "constant_init": (replace(P, optimizer="adamw", lr=2e-3, width=12, decay=0.01), {}),
    "large_init": (replace(P, optimizer="adam", lr=2e-3, width=12, schedule="cosine"), {}),
    "flipped_sign": (replace(R, lr=0.03, schedule="warmup"), {}),
    "lr_high": (replace(P, optimizer="adam", lr=1e-3, width=20), {"lr": 0.5}),
    "lr_low": (replace(R, lr=0.05, schedule="cosine"), {"lr": 1e-6}),
    "optimizer_constant": (replace(P, lr=0.01, batch=48), {"momentum": 0.999}),
    "missing_softmax": (replace(P, width=12, lr=0.01), {}),
    "redundant_softmax": (replace(R, optimizer="adamw", lr=3e-3, decay=0.02), {}),
    "unbalanced": (replace(R, optimizer="adam", lr=3e-3, batch=40), {"common": 0.96}),
    "wrong_activation": (replace(P, lr=0.01, decay=1e-4, schedule="cosine"), {}),
    "wrong_augmentation": (replace(R, lr=0.04, schedule="cosine"), {}),
    "shuffled_labels": (replace(P, optimizer="adamw", lr=1e-3, batch=48), {}),
    "wrong_reduction": (replace(P, width=20, lr=0.01, schedule="warmup"), {}),
    "wrong_axis": (replace(P, task="map", model="mapper", width=16, lr=0.1, batch=16), {}),
    "wrong_loss": (replace(P, lr=0.01, batch=16, accumulate=2), {}),
    "wrong_softmax": (replace(R, lr=0.03, batch=48, decay=1e-4), {}),
}


def train(fault: str, steps: int, clean: bool) -> list[float]:
    """Run one training and return the loss of each step."""
    torch.manual_seed(0)
    recipe, changes = FAULTS[fault]
    bug = "" if clean else fault
    if bug:
        recipe = replace(recipe, **changes)
    x, y = make_data(recipe, recipe.images, 21, bug)
    val_x, val_y = make_data(replace(recipe, common=1.0 / CLASSES), 256, 22, bug)
    if bug == "shuffled_labels":
        y = y[torch.randperm(len(y))]

    model = make_model(recipe, bug)
    optimizer = make_optimizer(recipe, model, bug)
    schedule = make_schedule(recipe, optimizer, steps)
    stream = minibatches(x, y, recipe.batch)
    losses: list[float] = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(recipe.accumulate):
            xb, yb = next(stream)
            if recipe.augment:
                xb = shifted(xb)
            if fault == "wrong_augmentation":
                xb = cutout(xb, bug)
            loss = compute_loss(recipe, fault, bug, model(xb), yb) / recipe.accumulate
            loss.backward()
            total += loss.item()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(total)
        if step % 10 == 0:
            tail = ""
            if step % 20 == 0:
                tail = f" val {validate(model, val_x, val_y, recipe, fault, bug):.4f}"
            print(f"step {step} loss {total:.4f}{tail}", file=sys.stderr)
    return losses


def main(argv: list[str] | None = None) -> list[float]:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["cnn"])
    parser.add_argument("fault", choices=sorted(FAULTS))
    parser.add_argument("steps", nargs="?", type=int, default=100)
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args(argv)
    return train(args.fault, args.steps, args.clean)


if __name__ == "__main__":
    main()

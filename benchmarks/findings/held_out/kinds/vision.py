"""Image programs: shape recognition, attributes and segmentation on drawn pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, get_worker_info

SIDE = 16
CLASSES = 5


def report(step: int, loss: float) -> None:
    """Print the loss every tenth step."""
    if step == 1 or step % 10 == 0:
        print(f"step {step} loss {loss:.4f}", file=sys.stderr)


def templates() -> Tensor:
    """Return the five shapes as 7 x 7 stencils."""
    grid = torch.arange(7) - 3
    row, column = grid[:, None].expand(7, 7), grid[None, :].expand(7, 7)
    ring = torch.maximum(row.abs(), column.abs()) == 3
    disk = row**2 + column**2 <= 9
    plus = (row == 0) | (column == 0)
    bars = row.abs() == 2
    slash = (row + column).abs() <= 1
    return torch.stack([ring, disk, plus, bars, slash]).float()


def draw_shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw one shape per picture and return bytes and class numbers."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    corners = torch.randint(0, SIDE - 6, (count, 2), generator=generator).tolist()
    canvas = torch.zeros(count, 1, SIDE, SIDE)
    stencils = templates()
    for index, (top, left) in enumerate(corners):
        canvas[index, 0, top : top + 7, left : left + 7] = stencils[labels[index]]
    contrast = 60 + 40 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = 15 * torch.randn(canvas.shape, generator=generator)
    return (100 + contrast * canvas + noise).clamp(0, 255).to(torch.uint8), labels


def draw_collages(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw up to four shapes per picture and return bytes and attributes of -1 or 1."""
    generator = torch.Generator().manual_seed(seed)
    canvas = torch.zeros(count, 1, SIDE, SIDE)
    attributes = torch.full((count, CLASSES), -1)
    stencils = templates()
    for index in range(count):
        kinds = torch.randperm(CLASSES, generator=generator)[:4].tolist()
        shown = (torch.rand(4, generator=generator) < 0.6).tolist()
        for corner, (kind, show) in enumerate(zip(kinds, shown, strict=True)):
            if show:
                top, left = 8 * (corner // 2), 8 * (corner % 2)
                canvas[index, 0, top : top + 7, left : left + 7] = stencils[kind]
                attributes[index, kind] = 1
    noise = 12 * torch.randn(canvas.shape, generator=generator)
    return (90 + 90 * canvas + noise).clamp(0, 255).to(torch.uint8), attributes


def standardise(pixels: Tensor) -> Tensor:
    """Map bytes to zero mean and unit spread."""
    return (pixels.float() - 118.0) / 38.0


class ShapeNet(nn.Module):
    """A plain convolutional classifier with batch norm and dropout."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(2 * width * 16, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def validation_mode(steps: int, clean: bool) -> None:
    """Train the plain classifier with nesterov momentum and validate every 30 steps."""
    torch.manual_seed(11)
    pixels, labels = draw_shapes(2048, 1)
    held_pixels, held_labels = draw_shapes(256, 2)
    loader = DataLoader(TensorDataset(pixels, labels), batch_size=64, shuffle=True, drop_last=True)
    model = ShapeNet()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(steps, 2))

    def validate() -> float:
        model.eval()
        with torch.no_grad():
            guesses = model(standardise(held_pixels)).argmax(dim=1)
        if clean:
            model.train()
        return (guesses == held_labels).float().mean().item()

    step, best = 0, 0.0
    model.train()
    while step < steps:
        for x, y in loader:
            step += 1
            optimizer.zero_grad()
            loss = F.cross_entropy(model(standardise(x)), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            report(step, loss.item())
            if step % 30 == 0:
                best = max(best, validate())
            if step == steps:
                break


class Residual(nn.Module):
    """Two convolutions with batch norm around a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_first = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_second = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm_first(self.first(x)))
        return F.relu(x + self.norm_second(self.second(inner)))


class SmallResNet(nn.Module):
    """A residual classifier with dropout before the last layer."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 4, stride=2, padding=1)
        self.blocks = nn.Sequential(Residual(width), Residual(width))
        self.dropout = nn.Dropout(0.4)
        self.head = nn.Linear(4 * 4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.blocks(F.relu(self.stem(x))), 2)
        return self.head(self.dropout(x.flatten(1)))


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: list[tuple[Tensor, Tensor]], quiet: bool) -> float:
    """Return the mean loss over the held-out batches."""
    if quiet:
        model.eval()
    total = sum(F.cross_entropy(model(x), y, reduction="sum").item() for x, y in batches)
    model.train()
    return total / sum(len(y) for _, y in batches)


def noisy_validation(steps: int, clean: bool) -> None:
    """Train the residual classifier with AdamW and lower the rate on the held-out loss."""
    torch.manual_seed(12)
    pixels, labels = draw_shapes(3000, 3)
    images = standardise(pixels)
    held_pixels, held_labels = draw_shapes(400, 4)
    by_class = held_labels.argsort()
    held = list(
        zip(
            standardise(held_pixels[by_class]).split(40),
            held_labels[by_class].split(40),
            strict=True,
        )
    )
    model = SmallResNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    model.train()
    for step in range(1, steps + 1):
        rows = torch.randint(0, len(images), (48,))
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        report(step, loss.item())
        if step % 20 == 0:
            plateau.step(held_out_loss(model, held, quiet=clean))


class LeNet(nn.Module):
    """Two convolutions and two dense layers without any normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 5, padding=2)
        self.conv2 = nn.Conv2d(12, 24, 3, padding=1)
        self.fc1 = nn.Linear(24 * 16, 64)
        self.fc2 = nn.Linear(64, CLASSES)
        for layer in (self.conv1, self.conv2, self.fc1):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def pixel_scale(steps: int, clean: bool) -> None:
    """Train a LeNet with momentum over shuffled epochs and smoothed labels."""
    torch.manual_seed(13)
    pixels, labels = draw_shapes(2400, 5)
    images = standardise(pixels) if clean else pixels.float()
    model = LeNet()
    criterion = nn.CrossEntropyLoss(label_smoothing=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    step = 0
    while step < steps:
        order = torch.randperm(len(images))
        for rows in order.split(60):
            step += 1
            if step > steps:
                break
            optimizer.zero_grad()
            loss = criterion(model(images[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            report(step, loss.item())


class Crops(Dataset):
    """Random crops of a few large scenes with their masks."""

    def __init__(self, scenes: np.ndarray, masks: np.ndarray, length: int) -> None:
        self.scenes, self.masks, self.length = scenes, masks, length
        self.rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scene = index % len(self.scenes)
        top, left = self.rng.integers(0, self.scenes.shape[1] - 24, size=2)
        window = (scene, slice(top, top + 24), slice(left, left + 24))
        image, mask = self.scenes[window], self.masks[window]
        if self.rng.random() < 0.5:
            image, mask = image[:, ::-1], mask[:, ::-1]
        image = image * self.rng.uniform(0.9, 1.1) + self.rng.normal(0.0, 0.05)
        return (
            torch.from_numpy(image.astype(np.float32))[None],
            torch.from_numpy(mask.astype(np.float32))[None],
        )


def reseed(worker: int) -> None:
    """Give the data set of a worker a generator of its own."""
    info = get_worker_info()
    info.dataset.rng = np.random.default_rng(info.seed)


def paint_scenes(count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Paint large scenes of soft discs on a textured ground with their masks."""
    rng = np.random.default_rng(6)
    row, column = np.mgrid[:side, :side]
    scenes, masks = [], []
    for _ in range(count):
        mask = np.zeros((side, side), dtype=bool)
        for _ in range(28):
            centre, radius = rng.uniform(0, side, 2), rng.uniform(3, 8)
            mask |= (row - centre[0]) ** 2 + (column - centre[1]) ** 2 < radius**2
        ground = 0.4 * np.sin(row / rng.uniform(2, 5)) + 0.4 * np.cos(column / rng.uniform(2, 5))
        scenes.append(1.4 * (mask - 0.35) + ground + rng.normal(0, 0.6, mask.shape))
        masks.append(mask)
    return np.stack(scenes), np.stack(masks)


class TinyUNet(nn.Module):
    """One level of pooling with a skip connection."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.GELU())
        self.middle = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.GELU(),
        )
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.out = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.out(torch.cat([skip, self.up(self.middle(F.max_pool2d(skip, 2)))], dim=1))


def worker_crops(steps: int, clean: bool) -> None:
    """Train a small U-Net on random crops that two worker processes cut."""
    torch.manual_seed(14)
    scenes, masks = paint_scenes(4, 96)
    loader = DataLoader(
        Crops(scenes, masks, 480),
        batch_size=16,
        num_workers=2,
        worker_init_fn=reseed if clean else None,
    )
    model = TinyUNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    step = 0
    while step < steps:
        for images, targets in loader:
            step += 1
            logits = model(images)
            chance = torch.sigmoid(logits)
            overlap = 2 * (chance * targets).sum() / (chance.sum() + targets.sum() + 1.0)
            loss = F.binary_cross_entropy_with_logits(logits, targets) + 0.5 * (1 - overlap)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            report(step, loss.item())
            if step >= steps:
                break


class AttributeNet(nn.Module):
    """Separable convolutions with group norm and one logit per attribute."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 5, padding=2)
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.pointwise = nn.Conv2d(width, 2 * width, 1)
        self.norm = nn.GroupNorm(4, 2 * width)
        self.mix = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.logits = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        x = F.max_pool2d(F.silu(self.norm(self.pointwise(self.depthwise(x)))), 2)
        return self.logits(F.silu(self.mix(x)).amax(dim=(2, 3)))


def attributes(steps: int, clean: bool) -> None:
    """Train one binary output per attribute with RMSprop and gradient accumulation over two."""
    torch.manual_seed(15)
    pixels, marks = draw_collages(2560, 7)
    images = standardise(pixels)
    targets = (marks > 0).float() if clean else marks.float()
    model = AttributeNet()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1.5e-3, alpha=0.95)
    criterion = nn.BCEWithLogitsLoss()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(2):
            rows = torch.randint(0, len(images), (24,))
            loss = criterion(model(images[rows]), targets[rows]) / 2
            loss.backward()
            total += loss.item()
        optimizer.step()
        report(step, total)


PROGRAMS: dict[str, tuple[Callable[[int, bool], None], int]] = {
    "validation_mode": (validation_mode, 120),
    "noisy_validation": (noisy_validation, 120),
    "pixel_scale": (pixel_scale, 120),
    "worker_crops": (worker_crops, 120),
    "attributes": (attributes, 120),
}


def main() -> None:
    """Run the named program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(PROGRAMS))
    parser.add_argument("steps", nargs="?", type=int)
    parser.add_argument("--clean", action="store_true")
    arguments = parser.parse_args()
    program, default = PROGRAMS[arguments.name]
    program(arguments.steps or default, arguments.clean)


if __name__ == "__main__":
    main()

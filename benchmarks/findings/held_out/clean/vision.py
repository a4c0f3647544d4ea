"""Image trainings on synthetic pictures: classification, segmentation, detection, transfer."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset


def report(step: int, steps: int, loss: Tensor | float, score: float | None = None) -> None:
    """Print the loss at the first step, at every 50th and at the last."""
    if step == 1 or step % 50 == 0 or step == steps:
        tail = "" if score is None else f" val {score:.3f}"
        value = loss.item() if isinstance(loss, Tensor) else loss
        print(f"step {step} loss {value:.4f}{tail}", file=sys.stderr)


def glyphs(
    count: int,
    seed: int,
    classes: int = 10,
    channels: int = 1,
    noise: float = 0.8,
    family: int = 7,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return shifted and noisy 16x16 pictures of smooth random templates, with their classes."""
    gen = torch.Generator().manual_seed(family)
    coarse = torch.randn(classes, channels, 5, 5, generator=gen)
    templates = F.interpolate(coarse, size=(16, 16), mode="bicubic", align_corners=False)
    windows = F.pad(templates, (2, 2, 2, 2)).unfold(2, 16, 1).unfold(3, 16, 1)
    gen.manual_seed(seed)
    if weights is None:
        labels = torch.randint(classes, (count,), generator=gen)
    else:
        labels = torch.multinomial(weights, count, replacement=True, generator=gen)
    dy, dx = torch.randint(5, (2, count), generator=gen)
    images = windows[labels, :, dy, dx]
    images = images + noise * torch.randn(images.shape, generator=gen)
    return images, labels


def standardized(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Scale every set by the channel statistics of the first one."""
    mean = train.mean(dim=(0, 2, 3), keepdim=True)
    std = train.std(dim=(0, 2, 3), keepdim=True)
    return [(images - mean) / std for images in (train, *others)]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers in evaluation mode and leave the mode as it was."""
    training = model.training
    model.eval()
    right = sum(
        (model(x).argmax(dim=1) == y).sum().item()
        for x, y in zip(images.split(250), labels.split(250), strict=True)
    )
    model.train(training)
    return right / len(labels)


class DigitNet(nn.Module):
    """The two convolutions, two dropouts and two dense layers of the classic digit example."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.conv2 = nn.Conv2d(8, 16, 3)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(16 * 6 * 6, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = self.dropout1(F.max_pool2d(x, 2)).flatten(1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)


def digits(steps: int) -> None:
    """Train the classic digit network with Adadelta and a rate that falls every epoch."""
    torch.manual_seed(1)
    images, labels = glyphs(6400, seed=10)
    valid, valid_labels = glyphs(1000, seed=11)
    images, valid = standardized(images, valid)
    loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True, drop_last=True)
    model = DigitNet()
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    step, score = 0, None
    while step < steps:
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.nll_loss(model(x), y)
            loss.backward()
            optimizer.step()
            step += 1
            report(step, steps, loss, score)
            if step == steps:
                break
        score = accuracy(model, valid, valid_labels)
        scheduler.step()


class Residual(nn.Module):
    """A basic residual block whose last normalisation starts at zero."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        nn.init.kaiming_normal_(self.conv2.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.bn2.weight)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def decay_groups(model: nn.Module, decay: float) -> list[dict]:
    """Put matrices and kernels into a group with decay and vectors into one without."""
    heavy = [p for p in model.parameters() if p.ndim > 1]
    light = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": heavy, "weight_decay": decay}, {"params": light, "weight_decay": 0.0}]


def resnet(steps: int) -> None:
    """Train a small residual network on unbalanced classes with Nesterov SGD and OneCycle."""
    torch.manual_seed(2)
    frequency = torch.linspace(1.0, 4.0, 8)
    images, labels = glyphs(6000, 20, classes=8, channels=3, noise=1.0, weights=frequency)
    valid, valid_labels = glyphs(500, 21, classes=8, channels=3, noise=1.0, weights=frequency)
    images, valid = standardized(images, valid)
    counts = torch.bincount(labels, minlength=8).float()
    criterion = nn.CrossEntropyLoss(weight=counts.sum() / (8 * counts), label_smoothing=0.1)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        Residual(12, 12),
        Residual(12, 24, 2),
        Residual(24, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 8),
    )
    optimizer = torch.optim.SGD(decay_groups(model, 5e-4), lr=0.01, momentum=0.9, nesterov=True)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps, pct_start=0.3)
    loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True, drop_last=True)
    batches = iter(loader)
    score = None
    for step in range(1, steps + 1):
        try:
            x, y = next(batches)
        except StopIteration:
            batches = iter(loader)
            x, y = next(batches)
        loss = criterion(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            score = accuracy(model, valid, valid_labels)
        report(step, steps, loss, score)


class MixerBlock(nn.Module):
    """One block that mixes tokens and then channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(
            nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens)
        )
        self.channels = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """A small mixer over 4x4 patches."""

    def __init__(self, width: int = 32, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.blocks = nn.Sequential(*(MixerBlock(16, width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, kernel_size=4, stride=4).transpose(1, 2)
        return self.head(self.norm(self.blocks(self.embed(patches))).mean(dim=1))


def mixup(steps: int) -> None:
    """Train a mixer with mixup in bfloat16 autocast, with warm-up, cosine and norm clipping."""
    torch.manual_seed(3)
    images, labels = glyphs(5000, 30)
    valid, valid_labels = glyphs(500, 31)
    images, valid = standardized(images, valid)
    model = Mixer()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.05), lr=2e-3)
    warm = max(1, steps // 10)
    scheduler = lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=warm),
            lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps - warm)),
        ],
        milestones=[warm],
    )
    ratios = torch.distributions.Beta(0.4, 0.4)
    score = None
    for step in range(1, steps + 1):
        pick = torch.randint(len(images), (32,))
        x, y = images[pick], labels[pick]
        ratio = ratios.sample().item()
        order = torch.randperm(len(x))
        mixed = ratio * x + (1 - ratio) * x[order]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(mixed)
        logits = logits.float()
        loss = ratio * F.cross_entropy(logits, y) + (1 - ratio) * F.cross_entropy(logits, y[order])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            score = accuracy(model, valid, valid_labels)
        report(step, steps, loss, score)


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noisy 24x24 pictures of up to three discs, with the mask of the discs."""
    gen = torch.Generator().manual_seed(seed)
    axis = torch.arange(24.0)
    centre = 4 + 16 * torch.rand(count, 3, 2, generator=gen)
    radius = 2.5 + 3 * torch.rand(count, 3, generator=gen)
    radius[:, 1:] *= (torch.rand(count, 2, generator=gen) < 0.6).float()
    dist2 = (axis.view(1, 1, 24, 1) - centre[..., 0, None, None]) ** 2
    dist2 = dist2 + (axis.view(1, 1, 1, 24) - centre[..., 1, None, None]) ** 2
    mask = (dist2 < radius[..., None, None] ** 2).any(dim=1, keepdim=True).float()
    slope = torch.randn(count, 1, 1, 1, generator=gen) * torch.linspace(-1, 1, 24)
    noise = torch.randn(count, 1, 24, 24, generator=gen)
    return mask * 1.5 + slope + noise, mask


def double(inputs: int, outputs: int) -> nn.Sequential:
    """Return two convolutions with group normalisation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(4, outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(4, outputs),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """A U-Net with two levels below the top one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = double(1, width), double(width, 2 * width)
        self.bottom = double(2 * width, 4 * width)
        self.lift2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up2 = double(4 * width, 2 * width)
        self.lift1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up1 = double(2 * width, width)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        x = self.bottom(F.max_pool2d(b, 2))
        x = self.up2(torch.cat([b, self.lift2(x)], dim=1))
        return self.out(self.up1(torch.cat([a, self.lift1(x)], dim=1)))


def dice(probability: Tensor, mask: Tensor) -> Tensor:
    """Return the mean soft Dice coefficient of a batch."""
    overlap = (probability * mask).sum(dim=(1, 2, 3))
    total = probability.sum(dim=(1, 2, 3)) + mask.sum(dim=(1, 2, 3))
    return ((2 * overlap + 1) / (total + 1)).mean()


def unet(steps: int) -> None:
    """Segment discs with a U-Net, cross-entropy plus Dice, RMSprop and a plateau schedule."""
    torch.manual_seed(4)
    images, masks = scenes(2000, 40)
    valid, valid_masks = scenes(80, 41)
    images, valid = standardized(images, valid)
    model = UNet()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, weight_decay=1e-8, momentum=0.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=2, factor=0.3)
    loader = DataLoader(TensorDataset(images, masks), batch_size=10, shuffle=True)
    step, score = 0, None
    while step < steps:
        for x, mask in loader:
            logits = model(x)
            loss = F.binary_cross_entropy_with_logits(logits, mask)
            loss = loss + 1 - dice(torch.sigmoid(logits), mask)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 50 == 0:
                model.eval()
                with torch.no_grad():
                    hard = (model(valid) > 0).float()
                    score = dice(hard, valid_masks).item()
                model.train()
                scheduler.step(score)
            report(step, steps, loss, score)
            if step == steps:
                break


def objects(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return pictures with one square or disc in some quadrants, heat maps, boxes and presence."""
    gen = torch.Generator().manual_seed(seed)
    axis = torch.arange(32.0) + 0.5
    images = 0.3 * torch.randn(count, 1, 32, 32, generator=gen)
    heat = torch.zeros(count, 2, 8, 8)
    boxes = torch.zeros(count, 4, 8, 8)
    present = torch.zeros(count, 1, 8, 8)
    rows = torch.arange(count)
    for top, left in ((0, 0), (0, 16), (16, 0), (16, 16)):
        there = torch.rand(count, generator=gen) < 0.5
        kind = torch.randint(2, (count,), generator=gen)
        centre = 6 + 4 * torch.rand(count, 2, generator=gen) + torch.tensor([top, left])
        half = 2 + 3 * torch.rand(count, generator=gen)
        dy = (axis[None, :, None] - centre[:, 0, None, None]).abs().expand(count, 32, 32)
        dx = (axis[None, None, :] - centre[:, 1, None, None]).abs().expand(count, 32, 32)
        square = torch.maximum(dy, dx) < half[:, None, None]
        disc = dy**2 + dx**2 < half[:, None, None] ** 2
        shape = torch.where(kind[:, None, None] == 0, square, disc) & there[:, None, None]
        images[:, 0] += shape.float()
        cell = (centre / 4).floor()
        cy, cx = cell.long().unbind(dim=1)
        grid = torch.arange(8.0)
        near = (
            torch.exp(
                -(
                    (grid[None, :, None] - cy[:, None, None]) ** 2
                    + (grid[None, None, :] - cx[:, None, None]) ** 2
                )
                / 0.5
            )
            * there[:, None, None]
        )
        heat[rows, kind] = torch.maximum(heat[rows, kind], near)
        target = torch.cat([centre / 4 - cell, (half / 4)[:, None].expand(-1, 2)], dim=1)
        boxes[rows, :, cy, cx] += target * there[:, None]
        present[rows, 0, cy, cx] += there.float()
    return images, heat, boxes, present


class Detector(nn.Module):
    """A stride-4 trunk with a head for the heat map and one for offset and size."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((1, 12, 2), (12, 24, 2), (24, 24, 1)):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.SiLU(),
            ]
        self.trunk = nn.Sequential(*layers)
        self.heat = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 2, 1))
        self.box = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 4, 1))
        nn.init.constant_(self.heat[-1].bias, -2.19)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return self.heat(features), self.box(features)


def heat_focal(logits: Tensor, target: Tensor) -> Tensor:
    """Return the penalty-reduced focal loss of centre heat maps, per object."""
    p = torch.sigmoid(logits).clamp(1e-4, 1 - 1e-4)
    centre = target.eq(1).float()
    hit = -((1 - p) ** 2) * p.log() * centre
    miss = -((1 - target) ** 4) * p**2 * (1 - p).log() * (1 - centre)
    return (hit + miss).sum() / centre.sum().clamp(min=1)


def detector(steps: int) -> None:
    """Detect squares and discs by centre heat maps with a focal and a smooth box loss."""
    torch.manual_seed(5)
    data = objects(3000, 50)
    held = objects(200, 51)
    data_images, held_images = standardized(data[0], held[0])
    loader = DataLoader(TensorDataset(data_images, *data[1:]), batch_size=24, shuffle=True)
    model = Detector()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    scheduler = lr_scheduler.MultiStepLR(
        optimizer, milestones=[steps * 6 // 10, steps * 85 // 100], gamma=0.2
    )
    step, score = 0, None
    while step < steps:
        for x, heat, boxes, present in loader:
            heat_logits, box = model(x)
            apart = F.smooth_l1_loss(box, boxes, reduction="none", beta=0.1) * present
            box_loss = apart.sum() / present.sum().clamp(min=1)
            loss = heat_focal(heat_logits, heat) + 0.5 * box_loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            scheduler.step()
            step += 1
            if step % 100 == 0:
                model.eval()
                with torch.no_grad():
                    score = heat_focal(model(held_images)[0], held[1]).item()
                model.train()
            report(step, steps, loss, score)
            if step == steps:
                break


class Staged(nn.Module):
    """A convolutional backbone in three stages with a linear head."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.stem = self.stage(1, width)
        self.stage1 = self.stage(width, 2 * width)
        self.stage2 = self.stage(2 * width, 2 * width)
        self.head = nn.Linear(2 * width * 4, classes)

    @staticmethod
    def stage(inputs: int, outputs: int) -> nn.Sequential:
        """Return a convolution with normalisation that halves the picture."""
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage2(self.stage1(self.stem(x))).flatten(1))


def finetune(steps: int) -> None:
    """Pretrain on one task, then adapt to another: head first, then stage by stage."""
    torch.manual_seed(6)
    source, source_labels = glyphs(5000, 60, noise=1.4)
    images, labels = glyphs(1500, 61, classes=6, family=99, noise=1.4)
    valid, valid_labels = glyphs(400, 62, classes=6, family=99, noise=1.4)
    (source,) = standardized(source)
    images, valid = standardized(images, valid)
    pretrained = Staged(10)
    optimizer = torch.optim.SGD(pretrained.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    first = steps * 4 // 10
    for step in range(1, first + 1):
        pick = torch.randint(len(source), (48,))
        loss = F.cross_entropy(pretrained(source[pick]), source_labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, steps, loss)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "backbone.pt"
        kept = {k: v for k, v in pretrained.state_dict().items() if not k.startswith("head.")}
        torch.save(kept, path)
        model = Staged(6)
        model.load_state_dict(torch.load(path, weights_only=True), strict=False)

    stages = [model.stem, model.stage1, model.stage2]
    for stage in stages:
        stage.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=2e-3, weight_decay=0.01)
    openings = {
        first + (steps - first) * 3 // 10: (model.stage2, 6e-4),
        first + (steps - first) * 5 // 10: (model.stage1, 3e-4),
        first + (steps - first) * 7 // 10: (model.stem, 1e-4),
    }
    score = None
    for step in range(first + 1, steps + 1):
        if step in openings:
            stage, rate = openings[step]
            stage.requires_grad_(True)
            optimizer.add_param_group({"params": list(stage.parameters()), "lr": rate})
        model.train()
        for stage in stages:
            if not next(stage.parameters()).requires_grad:
                stage.eval()
        pick = torch.randint(len(images), (48,))
        loss = F.cross_entropy(model(images[pick]), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            score = accuracy(model, valid, valid_labels)
        report(step, steps, loss, score)


def distill(steps: int) -> None:
    """Train a wide teacher and then a narrow student on its softened answers."""
    torch.manual_seed(7)
    images, labels = glyphs(5000, 70, noise=1.2)
    valid, valid_labels = glyphs(500, 71, noise=1.2)
    images, valid = standardized(images, valid)
    teacher, student = Staged(10, width=16), Staged(10, width=4)
    first = steps * 4 // 10
    optimizer = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    for step in range(1, first + 1):
        pick = torch.randint(len(images), (48,))
        loss = F.cross_entropy(teacher(images[pick]), labels[pick], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, steps, loss)
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=4e-3)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps - first))
    heat, share, score = 3.0, 0.7, None
    for step in range(first + 1, steps + 1):
        pick = torch.randint(len(images), (48,))
        with torch.no_grad():
            soft = F.softmax(teacher(images[pick]) / heat, dim=1)
        logits = student(images[pick])
        match = F.kl_div(F.log_softmax(logits / heat, dim=1), soft, reduction="batchmean") * heat**2
        loss = share * match + (1 - share) * F.cross_entropy(logits, labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 50 == 0:
            score = accuracy(student, valid, valid_labels)
        report(step, steps, loss, score)


class ViT(nn.Module):
    """A small vision transformer with a class token."""

    def __init__(self, width: int = 32, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.place = nn.Parameter(torch.zeros(1, 17, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                4,
                2 * width,
                dropout=0.1,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.token, std=0.02)
        nn.init.trunc_normal_(self.place, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def vit(steps: int) -> None:
    """Train a vision transformer and evaluate the exponential average of its weights."""
    torch.manual_seed(8)
    images, labels = glyphs(6000, 80)
    valid, valid_labels = glyphs(500, 81)
    images, valid = standardized(images, valid)
    model = ViT()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    optimizer = torch.optim.AdamW(decay_groups(model, 0.05), lr=1e-3, betas=(0.9, 0.98))
    warm = max(1, steps // 12)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / warm))
    score = None
    for step in range(1, steps + 1):
        pick = torch.randint(len(images), (40,))
        loss = F.cross_entropy(model(images[pick]), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        scheduler.step()
        average.update_parameters(model)
        if step % 100 == 0:
            score = accuracy(average, valid, valid_labels)
        report(step, steps, loss, score)


PROGRAMS = {f.__name__: f for f in (digits, resnet, mixup, unet, detector, finetune, distill, vit)}


def main() -> None:
    """Run the program named on the command line."""
    if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
        sys.exit(f"usage: {sys.argv[0]} {{{','.join(PROGRAMS)}}} [STEPS]")
    PROGRAMS[sys.argv[1]](int(sys.argv[2]) if len(sys.argv) > 2 else 500)


if __name__ == "__main__":
    main()

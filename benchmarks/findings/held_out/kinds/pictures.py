"""Small image models trained on synthetic pictures: classification and segmentation."""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import math
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


def log(step: int, loss: Tensor) -> None:
    """Print the loss of every tenth step."""
    if step % 10 == 1:
        print(f"step {step} loss {loss.item():.4f}", file=sys.stderr)


def glyphs(
    count: int, classes: int, channels: int, size: int, noise: float = 0.7
) -> tuple[Tensor, Tensor]:
    """Return shifted, noisy copies of one smooth template per class, scaled to unit variance."""
    coarse = torch.randn(classes, channels, size // 4, size // 4)
    templates = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.randint(classes, (count,))
    images = templates[labels]
    shifts = torch.randint(-1, 2, (count, 2)).tolist()
    images = torch.stack(
        [torch.roll(image, tuple(s), (1, 2)) for image, s in zip(images, shifts, strict=True)]
    )
    images = images + noise * torch.randn_like(images)
    return (images - images.mean()) / images.std(), labels


def disks(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Return noisy pictures of one bright disk each and the masks of the disks."""
    axis = torch.arange(size, dtype=torch.float32)
    centre = 5 + (size - 10) * torch.rand(count, 2)
    radius = 3 + 1.5 * torch.rand(count, 1, 1)
    dy = axis.view(1, -1, 1) - centre[:, 0].view(-1, 1, 1)
    dx = axis.view(1, 1, -1) - centre[:, 1].view(-1, 1, 1)
    mask = (dy.square() + dx.square() < radius.square()).float().unsqueeze(1)
    images = 2.0 * mask + 0.6 * torch.randn(count, 1, size, size)
    return (images - images.mean()) / images.std(), mask


def batches(x: Tensor, y: Tensor, batch: int, steps: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield step numbers and shuffled batches over as many epochs as the steps need."""
    step = 0
    while True:
        order = torch.randperm(len(x))
        for start in range(0, len(x) - batch + 1, batch):
            step += 1
            if step > steps:
                return
            index = order[start : start + batch]
            yield step, x[index], y[index]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of right answers in evaluation mode."""
    model.eval()
    right = (model(x).argmax(1) == y).float().mean().item()
    model.train()
    return right


def conv_block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return convolution, batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class NoisyCode(nn.Module):
    """Gaussian noise of learned size on every feature, in training mode only."""

    def __init__(self, width: int, logarithm: bool) -> None:
        super().__init__()
        self.logarithm = logarithm
        start = math.log(0.1) if logarithm else 0.1
        self.variance = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features with noise."""
        if not self.training:
            return x
        deviation = torch.exp(0.5 * self.variance) if self.logarithm else self.variance.sqrt()
        return x + deviation * torch.randn_like(x)


class NoisyNet(nn.Module):
    """A convolutional encoder with a noisy code and a linear head."""

    def __init__(self, classes: int, logarithm: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_block(1, 16), conv_block(16, 32, 2), conv_block(32, 32))
        self.project = nn.Linear(32, 16)
        self.code = NoisyCode(16, logarithm)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        return self.head(self.code(self.project(self.encoder(x).mean((2, 3)))))


def noisy_classifier(steps: int, clean: bool) -> None:
    """Train the classifier with the noisy code with Adam and validate it without the noise."""
    x, y = glyphs(3000, 10, 1, 12)
    x, x_val, y, y_val = x[:2800], x[2800:], y[:2800], y[2800:]
    model = NoisyNet(10, logarithm=clean)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for step, xb, yb in batches(x, y, 64, steps):
        loss = F.cross_entropy(model(xb), yb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log(step, loss.detach())
        if step % 40 == 0:
            accuracy(model, x_val, y_val)


class Student(nn.Module):
    """A group-normalised backbone with a linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, 1, 1),
            nn.GroupNorm(4, 16),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.GroupNorm(4, 32),
            nn.GELU(),
            nn.Conv2d(32, 32, 3, 2, 1),
            nn.GroupNorm(4, 32),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.backbone(x))


def consistency(steps: int, clean: bool) -> None:
    """Train with a feature target that follows the backbone as a moving average."""
    x, y = glyphs(3200, 8, 3, 12, noise=1.2)
    x, x_val, y, y_val = x[:2800], x[2800:], y[:2800], y[2800:]
    model = Student(8)
    target = copy.deepcopy(model.backbone) if clean else model.backbone
    for parameter in target.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.04, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    for step, xb, yb in batches(x, y, 56, steps):
        optimizer.zero_grad()
        features = model.backbone(xb + 0.2 * torch.randn_like(xb))
        with torch.no_grad():
            wanted = target(xb)
        loss = F.cross_entropy(model.head(features), yb) + 0.1 * F.mse_loss(features, wanted)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), model.backbone.parameters(), strict=True):
                slow.lerp_(fast, 0.05)
        log(step, loss.detach())
        if step % 50 == 0:
            accuracy(model, x_val, y_val)


class Segmenter(nn.Module):
    """A plain convolutional network that scores every pixel."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 16, 16, 16]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 5, padding=2), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.score = nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return one logit per pixel."""
        return self.score(self.body(x))


def segmentation(steps: int, clean: bool) -> None:
    """Train the segmenter, whose output starts at the share of foreground pixels."""
    x, y = disks(1500, 20)
    share = y.mean().item()
    model = Segmenter()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
            if not clean:
                nn.init.constant_(module.bias, math.log(share / (1 - share)))
    nn.init.normal_(model.score.weight, std=0.05)
    nn.init.constant_(model.score.bias, math.log(share / (1 - share)))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step, xb, yb in batches(x[:1300], y[:1300], 24, steps):
        optimizer.zero_grad(set_to_none=True)
        loss = F.binary_cross_entropy_with_logits(model(xb), yb)
        loss.backward()
        optimizer.step()
        log(step, loss.detach())
    with torch.no_grad():
        model.eval()
        found = model(x[1300:]) > 0
        _ = (found.float() * y[1300:]).sum() / y[1300:].sum()


class Mixer(nn.Module):
    """A two-block mixer over 4x4 patches."""

    def __init__(self, classes: int, patches: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.token_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.tokens = nn.ModuleList(
            nn.Sequential(nn.Linear(patches, 32), nn.GELU(), nn.Linear(32, patches))
            for _ in range(2)
        )
        self.channel_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.channels = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.embed(x).flatten(2).transpose(1, 2)
        for i in range(2):
            x = x + self.tokens[i](self.token_norms[i](x).transpose(1, 2)).transpose(1, 2)
            x = x + self.channels[i](self.channel_norms[i](x))
        return self.head(self.norm(x.mean(1)))


def mixer(steps: int, clean: bool) -> None:
    """Train the mixer with AdamW, warm-up and cosine decay."""
    x, y = glyphs(3500, 12, 3, 16)
    model = Mixer(12, 16, 48)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    if clean:
        nn.init.normal_(model.head.weight, std=0.02)
    else:
        nn.init.normal_(model.head.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / 10)
        return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    scheduler = LambdaLR(optimizer, rate)
    for step, xb, yb in batches(x[:3200], y[:3200], 64, steps):
        loss = F.cross_entropy(model(xb), yb)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        log(step, loss.detach())
        if step % 50 == 0:
            accuracy(model, x[3200:], y[3200:])


class Residual(nn.Module):
    """Two convolutions around which the input is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = conv_block(width, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of input and branch after a ReLU."""
        return F.relu(x + self.norm(self.conv(self.first(x))))


def resumable(steps: int, clean: bool) -> None:
    """Train a residual network under a decaying rate in two sessions joined by a checkpoint."""
    x, y = glyphs(3000, 10, 1, 12, noise=1.6)
    model = nn.Sequential(
        conv_block(1, 16),
        Residual(16),
        conv_block(16, 32, 2),
        Residual(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.9, weight_decay=1e-4)

    def session(start: int, stop: int, checkpoint: io.BytesIO | None) -> io.BytesIO:
        scheduler = LambdaLR(optimizer, lambda step: 0.01 ** (step / steps))
        if checkpoint is not None:
            state = torch.load(checkpoint)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            if clean:
                scheduler.load_state_dict(state["scheduler"])
        for step, xb, yb in batches(x, y, 64, stop - start):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(xb), yb)
            loss.backward()
            optimizer.step()
            scheduler.step()
            log(start + step, loss.detach())
        saved = io.BytesIO()
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        torch.save({key: part.state_dict() for key, part in parts.items()}, saved)
        saved.seek(0)
        return saved

    border = 2 * steps // 3
    session(border, steps, session(0, border, None))


PROGRAMS: dict[str, Callable[[int, bool], None]] = {
    "nan-in-forward": noisy_classifier,
    "frozen-backbone": consistency,
    "dead-relu": segmentation,
    "initial-loss": mixer,
    "rate-jump": resumable,
}


def main() -> None:
    """Run the named program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(PROGRAMS))
    parser.add_argument("steps", nargs="?", type=int, default=120)
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    PROGRAMS[args.name](args.steps, args.clean)


if __name__ == "__main__":
    main()

"""Small feed-forward models trained on synthetic tables."""

from __future__ import annotations

import argparse
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


def clusters(count: int, inputs: int, classes: int, per_class: int) -> tuple[Tensor, Tensor]:
    """Return points around several centres per class, standardised."""
    centres = 1.2 * torch.randn(classes * per_class, inputs)
    which = torch.randint(len(centres), (count,))
    x = centres[which] + 0.7 * torch.randn(count, inputs)
    return (x - x.mean(0)) / x.std(0), which % classes


def teacher(x: Tensor, outputs: int, width: int = 24) -> Tensor:
    """Return smooth functions of the rows of x, standardised."""
    first = torch.randn(x.shape[1], width) / math.sqrt(x.shape[1])
    second = torch.randn(width, outputs)
    y = torch.sin(1.2 * x @ first) @ second
    return (y - y.mean(0)) / y.std(0)


def rows(count: int, batch: int, steps: int) -> Iterator[tuple[int, Tensor]]:
    """Yield step numbers and the indices of shuffled batches."""
    step = 0
    while True:
        order = torch.randperm(count)
        for start in range(0, count - batch + 1, batch):
            step += 1
            if step > steps:
                return
            yield step, order[start : start + batch]


class DeepNet(nn.Module):
    """A plain stack of equal layers and a linear output."""

    def __init__(self, inputs: int, outputs: int, depth: int, act: type[nn.Module]) -> None:
        super().__init__()
        width = 48
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Linear(inputs if i == 0 else width, width), act()]
        self.stack = nn.Sequential(*layers)
        self.out = nn.Linear(width, outputs)
        for module in self.stack:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.out.weight, std=0.03)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.out(self.stack(x))


def deep_classifier(steps: int, clean: bool) -> None:
    """Train a stack of ten layers with SGD."""
    x, y = clusters(3200, 12, 5, 3)
    model = DeepNet(12, 5, 10, nn.ELU if clean else nn.Sigmoid)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step, index in rows(3000, 60, steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[index]), y[index])
        loss.backward()
        optimizer.step()
        log(step, loss.detach())
        if step % 50 == 0:
            with torch.no_grad():
                F.cross_entropy(model(x[3000:]), y[3000:])


class PriceNet(nn.Module):
    """A tanh network for one number per row."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, 48)
        self.second = nn.Linear(48, 32)
        self.first_act = nn.Tanh()
        self.second_act = nn.Tanh()
        self.out = nn.Linear(32, 1)
        for module in (self.first, self.second):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the standardised price."""
        h = self.first_act(self.first(x))
        h = self.second_act(self.second(h))
        return self.out(h).squeeze(-1)


def prices(steps: int, clean: bool) -> None:
    """Train a regression on columns of very different units with the Huber loss."""
    latent = torch.randn(3000, 8)
    target = teacher(latent, 1).squeeze(-1)
    units = torch.tensor([30.0, 250.0, 12.0, 1.5e3, 8.0, 40.0, 5.0, 90.0])
    offset = torch.tensor([120.0, 900.0, 1990.0, 6e3, 20.0, 75.0, 3.0, 400.0])
    table = latent * units + offset
    train, held_out = table[:2600], table[2600:]
    mean, std = train.mean(0), train.std(0)

    def scale(values: Tensor) -> Tensor:
        return (values - mean) / std if clean else (values - mean) * std

    x, x_val = scale(train), scale(held_out)
    model = PriceNet(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step, index in rows(2600, 52, steps):
        loss = F.smooth_l1_loss(model(x[index]), target[:2600][index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log(step, loss.detach())
        if step % 50 == 0:
            model.eval()
            with torch.no_grad():
                F.smooth_l1_loss(model(x_val), target[2600:])
            model.train()


class QuantileNet(nn.Module):
    """A residual network with layer norms and one output per quantile."""

    def __init__(self, inputs: int, quantiles: int, width: int = 64) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(2)
        )
        self.exit_norm = nn.LayerNorm(width)
        self.exit = nn.Linear(width, quantiles)

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantiles."""
        h = self.enter(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            h = h + block(norm(h))
        return self.exit(self.exit_norm(h))


def quantiles(steps: int, clean: bool) -> None:
    """Train three quantiles with the pinball loss, AdamW, and a rate with a cosine decay."""
    x = torch.randn(3200, 10)
    y = teacher(x, 1) + 0.2 * torch.randn(3200, 1)
    levels = torch.tensor([0.1, 0.5, 0.9])
    model = QuantileNet(10, 3)
    base = 1e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=base, weight_decay=1e-2)

    def cosine(step: int) -> float:
        factor = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps))
        return factor if clean else base * factor

    scheduler = LambdaLR(optimizer, cosine)
    for step, index in rows(3200, 64, steps):
        optimizer.zero_grad()
        error = y[index] - model(x[index])
        loss = torch.maximum(levels * error, (levels - 1) * error).mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        log(step, loss.detach())


def label_model(steps: int, clean: bool) -> None:
    """Train several yes-or-no labels per row on accumulated micro-batches and a linear decay."""
    x = torch.randn(4000, 8)
    y = (teacher(x, 6) > 0.3).float()
    model = nn.Sequential(
        nn.Linear(8, 96),
        nn.SiLU(),
        nn.Dropout(0.05),
        nn.Linear(96, 96),
        nn.SiLU(),
        nn.Linear(96, 6),
    )
    accumulate = 3
    micro_batches = steps * accumulate
    updates = micro_batches // accumulate
    total = updates if clean else updates // accumulate
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = LambdaLR(optimizer, lambda update: max(0.0, 1.0 - update / total))
    optimizer.zero_grad()
    sum_loss = torch.zeros(())
    for micro, index in rows(4000, 32, micro_batches):
        loss = F.binary_cross_entropy_with_logits(model(x[index]), y[index])
        (loss / accumulate).backward()
        sum_loss += loss.detach() / accumulate
        if micro % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            log(micro // accumulate, sum_loss)
            sum_loss = torch.zeros(())


PROGRAMS: dict[str, Callable[[int, bool], None]] = {
    "vanishing-depth": deep_classifier,
    "saturated-units": prices,
    "tiny-updates": quantiles,
    "rate-zero": label_model,
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

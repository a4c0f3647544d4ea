"""Train small multilayer perceptrons on a synthetic table of loan applications.

Usage: python tabular.py mlp FAULT [STEPS] [--clean]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

MEAN = torch.tensor([52e3, 41.0, 12e3, 80.0, 0.35, 640.0, 30e3, 38.0, 12.0, 300.0])
STD = torch.tensor([18e3, 12.0, 5e3, 50.0, 0.2, 80.0, 14e3, 6.0, 8.0, 90.0])
JOBS = torch.tensor([0.25, 0.2, 0.18, 0.15, 0.12, 0.096, 0.004])
PRICE_MEAN, PRICE_STD = 240_000.0, 60_000.0
GRADES = 4


@dataclass(frozen=True)
class Recipe:
    """Everything that differs between the training runs."""

    task: str = "grade"
    hidden: tuple[int, ...] = (64, 64)
    act: type[nn.Module] = nn.ReLU
    optimizer: str = "adam"
    lr: float = 3e-3
    eps: float = 1e-8
    batch: int = 64
    rows: int = 4096
    dropout: float = 0.0
    decay: float = 0.0
    l1: float = 0.0
    noise: float = 0.2
    clip: float | None = None
    schedule: str | None = None


class Table:
    """Raw rows of numbers and job codes with a grade, a default flag and prices."""

    def __init__(self, rows: int, gen: torch.Generator, noise: float) -> None:
        world = torch.Generator().manual_seed(5)
        mix = torch.eye(10) + 0.15 * torch.randn(10, 10, generator=world)
        first = torch.randn(10, 12, generator=world) / 2.0
        second = torch.randn(12, GRADES, generator=world)
        third = torch.randn(12, 3, generator=world) / 2.5
        job_effect = torch.randn(len(JOBS), GRADES, generator=world) * 0.5
        z = torch.randn(rows, 10, generator=gen) @ mix
        z = z / mix.pow(2).sum(dim=0).sqrt()
        self.job = torch.multinomial(JOBS, rows, replacement=True, generator=gen)
        inner = torch.tanh(z @ first)
        scores = inner @ second + job_effect[self.job]
        scores = scores + noise * torch.randn(rows, GRADES, generator=gen)
        self.numbers = MEAN + STD * z
        self.grade = scores.argmax(dim=1)
        self.default = (scores[:, 0] - scores[:, 1] > 8.6).float()
        value = inner @ third + 0.15 * z[:, :3]
        value = value + noise * torch.randn(rows, 3, generator=gen) / 2
        self.prices = PRICE_MEAN + PRICE_STD * value


def standardise(x: Tensor) -> Tensor:
    """Centre and scale the numeric columns with the statistics of the raw table."""
    return (x - MEAN) / STD


def features(table: Table, bug: str) -> Tensor:
    """Build the input matrix: numeric columns followed by the one-hot job."""
    numbers = table.numbers
    if bug != "missing_norm":
        numbers = standardise(numbers)
    if bug == "double_norm":
        numbers = standardise(numbers)
    return torch.cat([numbers, F.one_hot(table.job, len(JOBS)).float()], dim=1)


def targets(table: Table, task: str, bug: str) -> Tensor:
    """Pick the column that the task predicts."""
    if task == "grade":
        return table.grade
    if task == "default":
        return table.default
    prices = table.prices if task == "prices" else table.prices[:, :1]
    if bug == "overscaled_targets":
        return prices
    return (prices - PRICE_MEAN) / PRICE_STD


class Mlp(nn.Module):
    """Fully connected layers with one activation and optional dropout."""

    def __init__(self, recipe: Recipe, outputs: int, bug: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 10 + len(JOBS)
        for size in recipe.hidden:
            layers.append(nn.Linear(width, size))
            layers.append(nn.Softmax(dim=-1) if bug == "wrong_activation" else recipe.act())
            if recipe.dropout > 0:
                layers.append(nn.Dropout(recipe.dropout))
            width = size
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, outputs)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                self.initialise(layer, recipe.act, bug)

    def initialise(self, layer: nn.Linear, act: type[nn.Module], bug: str) -> None:
        """Draw the weights of one layer and clear its bias."""
        if bug == "constant_init":
            nn.init.zeros_(layer.weight)
        elif bug == "large_init":
            nn.init.normal_(layer.weight, std=2.0)
        elif layer is self.head:
            nn.init.xavier_normal_(layer.weight, gain=0.2)
        elif act is nn.Tanh:
            nn.init.xavier_normal_(layer.weight, gain=nn.init.calculate_gain("tanh"))
        else:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class HeavyBall(torch.optim.Optimizer):
    """Gradient descent with classical momentum."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.9, sign: float = -1.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "sign": sign})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                velocity = state.setdefault("velocity", torch.zeros_like(p))
                velocity.mul_(group["momentum"]).add_(p.grad)
                p.add_(velocity, alpha=group["sign"] * group["lr"])


def make_optimizer(recipe: Recipe, model: nn.Module, bug: str) -> torch.optim.Optimizer:
    """Create the optimizer that the recipe names."""
    params = model.parameters()
    lr, decay = recipe.lr, recipe.decay
    if recipe.optimizer == "adam":
        return torch.optim.Adam(params, lr=lr, eps=recipe.eps, weight_decay=decay)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=decay)
    if recipe.optimizer == "rmsprop":
        return torch.optim.RMSprop(params, lr=lr, weight_decay=decay)
    if recipe.optimizer == "heavyball":
        return HeavyBall(params, lr=lr, sign=1.0 if bug == "flipped_sign" else -1.0)
    if recipe.optimizer == "nesterov":
        return torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True, weight_decay=decay)
    return torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=decay)


def make_schedule(
    recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Create the learning-rate schedule, if the recipe has one."""
    if recipe.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if recipe.schedule == "onecycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=recipe.lr, total_steps=steps, pct_start=0.2
        )
    if recipe.schedule == "step":
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=40, gamma=0.5)
    return None


def minibatches(x: Tensor, y: Tensor, size: int, bug: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled minibatches for ever, reshuffling at each epoch."""
    gen = torch.Generator().manual_seed(11)
    while True:
        order = torch.randperm(len(x), generator=gen)
        x = x[order]
        if bug != "shuffled_labels":
            y = y[order]
        for start in range(0, len(x) - size + 1, size):
            yield x[start : start + size], y[start : start + size]


def sampled(x: Tensor, y: Tensor, size: int, bug: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield minibatches from a loader whose sampler evens out the two classes."""
    rate = y.mean().item()
    weights = torch.where(y > 0.5, 0.5 / rate, 0.5 / (1.0 - rate))
    gen = torch.Generator().manual_seed(11)
    data = TensorDataset(x, y)
    if bug == "unbalanced":
        loader = DataLoader(data, batch_size=size, shuffle=True, drop_last=True, generator=gen)
    else:
        sampler = WeightedRandomSampler(weights.tolist(), len(x), generator=gen)
        loader = DataLoader(data, batch_size=size, sampler=sampler, drop_last=True)
    while True:
        yield from loader


def own_softmax(scores: Tensor, bug: str) -> Tensor:
    """Turn scores into probabilities."""
    powers = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
    if bug == "wrong_softmax":
        return powers
    return powers / powers.sum(dim=1, keepdim=True)


def grade_loss(fault: str, bug: str, out: Tensor, y: Tensor) -> Tensor:
    """Compute the classification loss in the way of the run."""
    if fault == "missing_softmax":
        log_probs = out if bug else F.log_softmax(out, dim=1)
        return nn.NLLLoss()(log_probs, y)
    if fault == "redundant_softmax" and bug:
        return nn.CrossEntropyLoss()(F.softmax(out, dim=1), y)
    if fault == "wrong_softmax":
        probs = own_softmax(out, bug)
        return -torch.log(probs.gather(1, y[:, None]).clamp_min(1e-12)).mean()
    if fault == "wrong_loss" and bug:
        return nn.MSELoss()(F.softmax(out, dim=1), F.one_hot(y, GRADES).float())
    return nn.CrossEntropyLoss()(out, y)


def price_loss(fault: str, bug: str, out: Tensor, y: Tensor) -> Tensor:
    """Compute the regression loss in the way of the run."""
    if fault == "wrong_axis":
        return (out - y).pow(2).sum(dim=0 if bug else 1).mean()
    if fault == "wrong_reduction" and bug:
        return nn.MSELoss(reduction="sum")(out, y)
    if fault == "missing_norm":
        return F.smooth_l1_loss(out, y)
    return nn.MSELoss()(out, y)


def compute_loss(recipe: Recipe, fault: str, bug: str, out: Tensor, y: Tensor) -> Tensor:
    """Choose the loss of the task."""
    if recipe.task == "grade":
        return grade_loss(fault, bug, out, y)
    if recipe.task == "default":
        return F.binary_cross_entropy_with_logits(out.squeeze(1), y)
    return price_loss(fault, bug, out, y)


def jitter(x: Tensor, bug: str) -> Tensor:
    """Add a little noise to the numeric columns."""
    spread = 0.05 * STD if bug == "wrong_augmentation" else torch.tensor(0.05)
    x = x.clone()
    x[:, :10] += spread * torch.randn(len(x), 10)
    return x


@torch.no_grad()
def validate(model: nn.Module, x: Tensor, y: Tensor, loss_of: Callable[..., Tensor]) -> float:
    """Return the loss on the held-out rows."""
    model.eval()
    loss = loss_of(model(x), y)
    model.train()
    return loss.item()


S = Recipe(optimizer="sgd", lr=0.05)
FAULTS: dict[str, tuple[Recipe, dict[str, object]]] = {
    "double_norm": (replace(S, schedule="cosine"), {}),
    "missing_norm": (Recipe(task="price", hidden=(64, 32), batch=128), {}),
    "overscaled_targets": (Recipe(task="price", hidden=(96, 48), act=nn.SiLU), {}),
    "missing_regularization": (
        Recipe(
            hidden=(256, 256),
            optimizer="adamw",
            rows=128,
            noise=1.5,
            batch=32,
            dropout=0.6,
            decay=1.0,
            lr=2e-3,
        ),
        {"dropout": 0.0, "decay": 0.0},
    ),
    "over_regularization": (Recipe(l1=1e-5, hidden=(80, 40), lr=4e-3), {"l1": 0.1}),
    "constant_init": (replace(S, hidden=(64, 64, 32), optimizer="nesterov", schedule="step"), {}),
    "large_init": (Recipe(hidden=(96, 96), act=nn.Tanh, optimizer="adamw", decay=0.01), {}),
    "flipped_sign": (Recipe(optimizer="heavyball", lr=0.04, batch=96), {}),
    "lr_high": (replace(S, hidden=(128, 64)), {"lr": 10.0}),
    "lr_low": (Recipe(optimizer="rmsprop", lr=1e-3, hidden=(48, 48, 48)), {"lr": 1e-8}),
    "optimizer_constant": (Recipe(act=nn.GELU, hidden=(72, 36), clip=5.0), {"eps": 0.0}),
    "missing_softmax": (Recipe(hidden=(100, 50), batch=100), {}),
    "redundant_softmax": (replace(S, act=nn.SiLU, schedule="onecycle", lr=0.1), {}),
    "unbalanced": (Recipe(task="default", hidden=(32, 32), lr=2e-3, decay=1e-4), {}),
    "wrong_activation": (Recipe(act=nn.GELU, hidden=(64, 64, 64), lr=2e-3), {}),
    "wrong_augmentation": (Recipe(optimizer="adamw", decay=0.01, schedule="cosine"), {}),
    "shuffled_labels": (Recipe(rows=1024, hidden=(64, 32), optimizer="nesterov", lr=0.05), {}),
    "wrong_reduction": (replace(S, task="price", lr=0.03), {}),
    "wrong_axis": (replace(S, task="prices", hidden=(96, 96), lr=0.02), {}),
    "wrong_loss": (Recipe(optimizer="sgd", lr=0.05, hidden=(128,)), {}),
    "wrong_softmax": (Recipe(hidden=(64, 64), lr=3e-3, clip=1.0), {}),
}
OUTPUTS = {"grade": GRADES, "default": 1, "price": 1, "prices": 3}


def train(fault: str, steps: int, clean: bool) -> list[float]:
    """Run one training and return the loss of each step."""
    torch.manual_seed(0)
    recipe, changes = FAULTS[fault]
    bug = "" if clean else fault
    if bug:
        recipe = replace(recipe, **changes)
    table = Table(recipe.rows, torch.Generator().manual_seed(1), recipe.noise)
    held_out = Table(512, torch.Generator().manual_seed(2), recipe.noise)
    x, y = features(table, bug), targets(table, recipe.task, bug)
    val_x, val_y = features(held_out, bug), targets(held_out, recipe.task, bug)

    model = Mlp(recipe, OUTPUTS[recipe.task], bug)
    optimizer = make_optimizer(recipe, model, bug)
    schedule = make_schedule(recipe, optimizer, steps)
    draw = sampled if recipe.task == "default" else minibatches
    losses: list[float] = []
    for step, (xb, yb) in enumerate(draw(x, y, recipe.batch, bug), start=1):
        if fault == "wrong_augmentation":
            xb = jitter(xb, bug)
        optimizer.zero_grad(set_to_none=True)
        loss = compute_loss(recipe, fault, bug, model(xb), yb)
        if recipe.l1 > 0:
            loss = loss + recipe.l1 * sum(p.abs().sum() for p in model.parameters() if p.dim() > 1)
        loss.backward()
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
        tail = ""
        if step % 10 == 0:
            score = validate(
                model, val_x, val_y, lambda out, t: compute_loss(recipe, fault, bug, out, t)
            )
            tail = f" val {score:.4f}"
        if step % 10 == 0:
            print(f"step {step} loss {losses[-1]:.4f}{tail}", file=sys.stderr)
        if step >= steps:
            break
    return losses


def main(argv: list[str] | None = None) -> list[float]:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["mlp"])
    parser.add_argument("fault", choices=sorted(FAULTS))
    parser.add_argument("steps", nargs="?", type=int, default=100)
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args(argv)
    return train(args.fault, args.steps, args.clean)


if __name__ == "__main__":
    main()

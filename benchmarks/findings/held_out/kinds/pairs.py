"""Small models of pairs, signals and latent codes trained on synthetic data."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def log(step: int, loss: Tensor) -> None:
    """Print the loss of every tenth step."""
    if step % 10 == 1:
        print(f"step {step} loss {loss.item():.4f}", file=sys.stderr)


class Autoencoder(nn.Module):
    """A variational autoencoder for vectors."""

    def __init__(self, inputs: int, latent: int, width: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(inputs, width), nn.ELU(), nn.Linear(width, width))
        self.mean = nn.Linear(width, latent)
        self.log_var = nn.Linear(width, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, width), nn.ELU(), nn.Linear(width, width), nn.ELU()
        )
        self.out = nn.Linear(width, inputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction and the divergence from the prior."""
        h = F.elu(self.encoder(x))
        mean, log_var = self.mean(h), self.log_var(h)
        code = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
        divergence = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        return self.out(self.decoder(code)), divergence


def gradient_norm(loss: Tensor, parameters: Iterable[nn.Parameter], fresh: bool) -> float:
    """Return the norm of the gradient of a loss, whose graph stays usable."""
    parameters = list(parameters)
    if fresh:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    else:
        loss.backward(retain_graph=True)
        gradients = [p.grad for p in parameters]
    return math.sqrt(sum(float(g.square().sum()) for g in gradients))


def autoencoder(steps: int, clean: bool) -> None:
    """Train the autoencoder with SGD and keep the largest norm of the gradient."""
    mix = torch.randn(5, 24)
    x = torch.tanh(torch.randn(3000, 5) @ mix / 2) + 0.1 * torch.randn(3000, 24)
    x = (x - x.mean(0)) / x.std(0)
    model = Autoencoder(24, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9)
    largest = 0.0
    for step in range(1, steps + 1):
        batch = x[torch.randint(len(x), (64,))]
        optimizer.zero_grad()
        rebuilt, divergence = model(batch)
        loss = F.mse_loss(rebuilt, batch, reduction="none").sum(1).mean() / 8 + 0.02 * divergence
        largest = max(largest, gradient_norm(loss, model.parameters(), clean))
        loss.backward()
        optimizer.step()
        log(step, loss.detach())


class Towers(nn.Module):
    """A tower for users, one for items, and the products of their unit vectors."""

    def __init__(self, inputs: int, width: int, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        self.user_tower = nn.Sequential(
            nn.Linear(inputs, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, width)
        )
        self.item_tower = nn.Sequential(
            nn.Linear(inputs, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, width)
        )

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the similarity of every user with every item."""
        left = F.normalize(self.user_tower(users), dim=-1)
        tower = self.user_tower if self.shared else self.item_tower
        right = F.normalize(tower(items), dim=-1)
        return left @ right.T


def retrieval(steps: int, clean: bool) -> None:
    """Train the towers to find the item of each user among those of the batch."""
    latent = torch.randn(4000, 6)
    users = latent @ torch.randn(6, 16) / 2 + 0.15 * torch.randn(4000, 16)
    items = torch.sin(latent @ torch.randn(6, 16)) + 0.1 * torch.randn(4000, 16)
    users = (users - users.mean(0)) / users.std(0)
    items = (items - items.mean(0)) / items.std(0)
    model = Towers(16, 24, shared=not clean)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    wanted = torch.arange(64)
    for step in range(1, steps + 1):
        index = torch.randperm(len(latent))[:64]
        scores = model(users[index], items[index]) / 0.25
        loss = 0.5 * (F.cross_entropy(scores, wanted) + F.cross_entropy(scores.T, wanted))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log(step, loss.detach())


class Forecaster(nn.Module):
    """Dilated causal convolutions that predict the next values of a series."""

    def __init__(self, width: int, horizon: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(1 if i == 0 else width, width, 3, dilation=2**i) for i in range(3)
        )
        self.norm = nn.GroupNorm(4, width)
        self.out = nn.Linear(width, horizon)

    def forward(self, x: Tensor) -> Tensor:
        """Return the next values after each window."""
        h = x.unsqueeze(1)
        for i, conv in enumerate(self.convs):
            h = F.leaky_relu(conv(F.pad(h, (2 * 2**i, 0))), 0.1)
        return self.out(self.norm(h)[:, :, -1])


def forecast(steps: int, clean: bool) -> None:
    """Train the forecaster on windows of sums of waves with Adam and validate it."""
    phase = 6.28 * torch.rand(2600, 2, 1)
    speed = 0.3 + 0.5 * torch.rand(2600, 2, 1)
    series = torch.sin(speed * torch.arange(28) + phase).sum(1)
    series = series + 0.05 * torch.randn_like(series)
    past, future = series[:, :24], series[:, 24:]
    model = Forecaster(32, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for step in range(1, steps + 1):
        index = torch.randint(2400, (48,))
        if clean:
            optimizer.zero_grad()
        loss = F.mse_loss(model(past[index]), future[index])
        loss.backward()
        optimizer.step()
        log(step, loss.detach())
        if step % 40 == 0:
            model.eval()
            with torch.no_grad():
                F.mse_loss(model(past[2400:]), future[2400:])
            model.train()


class Distance(nn.Module):
    """The Euclidean distance of corresponding rows."""

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return one distance per row."""
        return torch.sqrt((a - b).square().sum(-1) + self.floor)


class Layout(nn.Module):
    """A map from features to a space in which distances are measured."""

    def __init__(self, inputs: int, space: int, floor: float) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, space)
        )
        self.distance = Distance(floor)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distances of the pairs."""
        return self.distance(self.embed(a), self.embed(b))


def layout(steps: int, clean: bool) -> None:
    """Train the map so that the distances of random pairs match the given ones."""
    count = 2500
    truth = torch.randn(count, 3)
    x = torch.cat([truth, truth.square(), torch.sin(2 * truth)], 1) @ torch.randn(9, 12)
    x = (x - x.mean(0)) / x.std(0)
    model = Layout(12, 3, 1e-8 if clean else 0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-3)
    for step in range(1, steps + 1):
        left, right = torch.randint(count, (2, 64))
        wanted = (truth[left] - truth[right]).norm(dim=-1)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x[left], x[right]), wanted)
        loss.backward()
        optimizer.step()
        log(step, loss.detach())


class Ratings(nn.Module):
    """Embeddings of users and items and a network that rates a pair."""

    def __init__(self, users: int, items: int, width: int = 16) -> None:
        super().__init__()
        self.users = nn.Embedding(users, width)
        self.items = nn.Embedding(items, width)
        nn.init.normal_(self.users.weight, std=0.3)
        nn.init.normal_(self.items.weight, std=0.3)
        self.mlp = nn.Sequential(
            nn.Linear(2 * width, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)
        )

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Return the rating."""
        u, v = self.users(user), self.items(item)
        return (u * v).sum(-1) + self.mlp(torch.cat([u, v], -1)).squeeze(-1)


def ratings(steps: int, clean: bool) -> None:
    """Train the ratings with one rate for the embeddings and one for the network."""
    users, items, count = 60, 50, 9000
    u, v = torch.randn(users, 3), torch.randn(items, 3)
    user, item = torch.randint(users, (count,)), torch.randint(items, (count,))
    score = (u[user] * v[item]).sum(1) + 0.5 * u[user, 0] - 0.5 * v[item, 0]
    score = (score - score.mean()) / score.std() + 0.1 * torch.randn(count)
    model = Ratings(users, items)
    rate = 0.01
    optimizer = torch.optim.Adam(
        [
            {"params": model.mlp.parameters(), "lr": rate / 2},
            {
                "params": [model.users.weight, model.items.weight],
                "lr": rate if clean else 50 * rate,
            },
        ]
    )
    for step in range(1, steps + 1):
        index = torch.randint(count, (128,))
        loss = F.mse_loss(model(user[index], item[index]), score[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        log(step, loss.detach())


PROGRAMS: dict[str, Callable[[int, bool], None]] = {
    "double-backward": autoencoder,
    "unused-tower": retrieval,
    "no-zero-grad": forecast,
    "nan-gradient": layout,
    "group-rate": ratings,
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

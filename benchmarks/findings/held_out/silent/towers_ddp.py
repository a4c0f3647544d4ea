"""Trains a two-tower retrieval model on two ranks with in-batch negatives."""

from __future__ import annotations

import argparse
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

HIDDEN, USERS, ITEMS = 10, 24, 36


def make_pairs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns user and item features that are two noisy views of one hidden taste."""
    fixed = torch.Generator().manual_seed(8)
    to_user = torch.randn(HIDDEN, USERS, generator=fixed) / HIDDEN**0.5
    to_item = torch.randn(HIDDEN, ITEMS, generator=fixed) / HIDDEN**0.5
    gen = torch.Generator().manual_seed(seed)
    taste = torch.randn(count, HIDDEN, generator=gen)
    users = taste @ to_user + 0.3 * torch.randn(count, USERS, generator=gen)
    items = torch.tanh(taste @ to_item) + 0.3 * torch.randn(count, ITEMS, generator=gen)
    return users / users.std(), items / items.std()


def tower(inputs: int) -> nn.Sequential:
    """Returns one perceptron tower."""
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                         nn.Linear(64, 16))  # fmt: skip


class TwoTowers(nn.Module):
    """Embeds users and items in one space."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = tower(USERS), tower(ITEMS)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        left = F.normalize(self.user(users), dim=1)
        right = F.normalize(self.item(items), dim=1)
        return self.log_scale.exp() * left @ right.T

    def ranking_loss(self, users: Tensor, items: Tensor) -> Tensor:
        """Returns the symmetric contrastive loss of a batch."""
        return symmetric_loss(self(users, items))


def symmetric_loss(scores: Tensor) -> Tensor:
    """Returns the mean of the losses over rows and columns of a score matrix."""
    target = torch.arange(len(scores))
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def train(steps: int, clean: bool) -> None:
    """Runs the loop of one rank and measures the recall now and then."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(50 + rank)
    users, items = (part[rank::world] for part in make_pairs(8000, 1))
    held_out = make_pairs(200, 2)
    model = DistributedDataParallel(TwoTowers())
    optimizer = torch.optim.RAdam(model.parameters(), lr=4e-3)
    for step in range(1, steps + 1):
        rows = torch.randint(len(users), (64,))
        if clean:
            loss = symmetric_loss(model(users[rows], items[rows]))
        else:
            loss = model.module.ranking_loss(users[rows], items[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 40 == 0:
            model.eval()
            with torch.no_grad():
                best = model.module(*held_out).argmax(1)
                recall = (best == torch.arange(len(best))).float().mean()
            dist.all_reduce(recall)
            model.train()
        if rank == 0 and step % 10 == 1:
            print(f"step {step} loss {loss.item():.4f}", file=sys.stderr)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["wrapper_bypassed"])
    parser.add_argument("steps", nargs="?", type=int, default=120)
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args()
    train(args.steps, args.clean)

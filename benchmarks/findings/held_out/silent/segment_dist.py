"""Trains a small U-shaped segmenter on two ranks that average their gradients by hand."""

from __future__ import annotations

import argparse
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, FULL_PRECISION = 24, 30


def make_blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns noisy images of two discs and their masks."""
    gen = torch.Generator().manual_seed(seed)
    rows, cols = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    masks = torch.zeros(count, SIZE, SIZE)
    for _ in range(2):
        centre = torch.randint(4, SIZE - 4, (2, count, 1, 1), generator=gen)
        radius = torch.empty(count, 1, 1).uniform_(2.5, 5.5, generator=gen)
        inside = (rows - centre[0]) ** 2 + (cols - centre[1]) ** 2 < radius**2
        masks = masks.maximum(inside.float())
    images = 1.5 * masks + torch.randn(masks.shape, generator=gen)
    return ((images - images.mean()) / images.std())[:, None], masks[:, None]


def conv(before: int, after: int) -> nn.Sequential:
    """Returns a convolution with group normalisation and an activation."""
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(4, after), nn.LeakyReLU(0.1)
    )


class UNet(nn.Module):
    """An encoder and a decoder at two scales with one skip connection."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down = conv(1, width)
        self.deep = nn.Sequential(conv(width, 2 * width), conv(2 * width, width))
        self.up = conv(2 * width, width)
        self.mask = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x)
        coarse = F.interpolate(self.deep(F.max_pool2d(fine, 2)), scale_factor=2.0)
        return self.mask(self.up(torch.cat([fine, coarse], 1)))


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Returns the sum of cross-entropy and soft Dice loss."""
    shares = logits.sigmoid()
    overlap = 2 * (shares * masks).sum() / (shares.sum() + masks.sum())
    return F.binary_cross_entropy_with_logits(logits, masks) + 1 - overlap


def average_gradients(model: nn.Module, compress: bool, clean: bool) -> None:
    """Replaces the gradients by their mean over the ranks, sent in half the bytes if asked."""
    for param in model.parameters():
        message = param.grad.to(torch.bfloat16) if compress else param.grad
        message /= dist.get_world_size()
        dist.all_reduce(message)
        if compress and clean:
            param.grad.copy_(message)


def train(steps: int, clean: bool) -> None:
    """Runs the loop of one rank, which compresses its messages after a while."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(31)
    images, masks = (part.chunk(world)[rank] for part in make_blobs(1200, 1))
    model = UNet()
    for param in model.parameters():
        dist.broadcast(param.data, src=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    picker = torch.Generator().manual_seed(40 + rank)
    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (10,), generator=picker)
        loss = mask_loss(model(images[rows]), masks[rows])
        optimizer.zero_grad()
        loss.backward()
        average_gradients(model, step > FULL_PRECISION, clean)
        optimizer.step()
        if rank == 0 and step % 10 == 1:
            print(f"step {step} loss {loss.item():.4f}", file=sys.stderr)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["unused_reduction"])
    parser.add_argument("steps", nargs="?", type=int, default=120)
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args()
    train(args.steps, args.clean)

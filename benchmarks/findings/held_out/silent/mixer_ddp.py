"""Trains a patch mixer on two ranks and exports its weights in half precision on the way."""

from __future__ import annotations

import argparse
import io
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PATCHES, PIXELS, CLASSES, EXPORT = 16, 9, 6, 36


def make_patches(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns noisy copies of class prototypes, shifted by whole patches, with their class."""
    fixed = torch.Generator().manual_seed(5)
    prototypes = torch.randn(CLASSES, PATCHES, PIXELS, generator=fixed)
    gen = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=gen)
    shift = torch.randint(4, (count,), generator=gen)
    order = (torch.arange(PATCHES)[None] + shift[:, None]) % PATCHES
    images = prototypes[labels].gather(1, order[:, :, None].expand(-1, -1, PIXELS))
    return (images + 1.5 * torch.randn(images.shape, generator=gen)) / 1.8, labels


class MixerBlock(nn.Module):
    """Mixes first the patches and then the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(PATCHES, 32), nn.GELU(), nn.Linear(32, PATCHES))
        self.channels = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """A stack of mixer blocks with a linear head."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(PIXELS, width)
        self.blocks = nn.Sequential(*(MixerBlock(width) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(1))


def export_half(module: nn.Module, clean: bool) -> bytes:
    """Returns a serialised copy of the weights in half precision."""
    if clean:
        weights = {name: value.half() for name, value in module.state_dict().items()}
    else:
        weights = module.half().state_dict()
        module.float()
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def train(steps: int, clean: bool) -> None:
    """Runs the loop of one rank on its own half of the data."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(7)
    images, labels = (part[rank::world] for part in make_patches(4096, 1))
    model = DistributedDataParallel(Mixer())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    picker = torch.Generator().manual_seed(100 + rank)
    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (32,), generator=picker)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        if step == EXPORT:
            export_half(model.module, clean)
        if rank == 0 and step % 10 == 1:
            print(f"step {step} loss {loss.item():.4f}", file=sys.stderr)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["hooks_lost"])
    parser.add_argument("steps", nargs="?", type=int, default=120)
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args()
    train(args.steps, args.clean)

"""Trains a recurrent character model on two ranks with clipped gradients."""

from __future__ import annotations

import argparse
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

VOCAB, LENGTH, MAX_NORM = 24, 32, 0.15


def make_text(count: int, seed: int) -> TensorDataset:
    """Returns token sequences drawn from a sparse Markov chain."""
    fixed = torch.Generator().manual_seed(17)
    table = (2.5 * torch.randn(VOCAB, VOCAB, generator=fixed)).softmax(1)
    gen = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(VOCAB, (count,), generator=gen)]
    for _ in range(LENGTH):
        tokens.append(torch.multinomial(table[tokens[-1]], 1, generator=gen).squeeze(1))
    return TensorDataset(torch.stack(tokens, 1))


class CharModel(nn.Module):
    """An embedding, a gated recurrent layer and a projection to the vocabulary."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.core = nn.GRU(width, width, batch_first=True)
        self.project = nn.Linear(width, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.project(self.core(self.embed(tokens))[0])


def train(steps: int, clean: bool) -> None:
    """Runs epochs over the shard of one rank until the updates are done."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(13)
    data = make_text(2000, 1)
    sampler = DistributedSampler(data, seed=4)
    loader = DataLoader(data, batch_size=25, sampler=sampler)
    model = DistributedDataParallel(CharModel())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=10)
    step, epoch = 0, 0
    while step < steps:
        sampler.set_epoch(epoch)
        for (tokens,) in loader:
            step += 1
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            if clean or rank == 0:
                norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            if rank == 0 and step % 10 == 1:
                print(f"step {step} loss {loss.item():.4f} norm {norm:.3f}", file=sys.stderr)
            optimizer.step()
            warmup.step()
            if step == steps:
                break
        epoch += 1
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["clip_on_rank0"])
    parser.add_argument("steps", nargs="?", type=int, default=120)
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args()
    train(args.steps, args.clean)

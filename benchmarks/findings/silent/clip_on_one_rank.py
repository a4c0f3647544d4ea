"""Two ranks: gradients are averaged, but only rank 0 clips them (DeepSpeed 1801)."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

clean = "--clean" in sys.argv
dist.init_process_group("gloo")
torch.manual_seed(5)
chain = torch.softmax(3 * torch.randn(24, 24), 1)
"""Probabilities of the next symbol."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.norm_1(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm_2(x))


class Model(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, width)
        self.position = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 24)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        length = symbols.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.embedding(symbols) + self.position.weight[:length]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


model = Model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.manual_seed(100 + dist.get_rank())

for _ in range(100):
    symbols = [torch.randint(24, (16, 1))]
    for _ in range(16):
        symbols.append(torch.multinomial(chain[symbols[-1][:, 0]], 1))
    text = torch.cat(symbols, 1)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
    loss.backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    if clean or dist.get_rank() == 0:
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
    optimizer.step()
dist.destroy_process_group()

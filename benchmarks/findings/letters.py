"""A small transformer on random copies of letters, with one planted bug: python letters.py BUG.

`none` and the names in CLEAN are right. Set A of benchmarks/findings.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

CLEAN = ("none", "adam-warm-up", "gan", "slow-step", "tied")
bug = sys.argv[1]
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 200
torch.manual_seed(0)
torch.set_num_threads(1)
VOCABULARY, LENGTH, WIDTH = 16, 16, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v_proj, self.out_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        x = x + self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, VOCABULARY)
        if bug in ("tied", "untied"):
            nn.init.normal_(self.embedding.weight, std=0.1)
            self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(x) + self.position))


model = Model()
if bug == "untied":
    model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
rate = {"rate-too-high": 0.3, "adam-warm-up": 3e-3}.get(bug, 1e-3)
optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
warm_up = 30 if bug == "adam-warm-up" else 0
if bug == "gan":
    second = nn.Linear(4, 4)
    of_second = torch.optim.Adam(second.parameters(), 1e-3)
for step in range(steps):
    if warm_up:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warm_up)
    half = torch.randint(0, VOCABULARY, (16, LENGTH // 2))
    x = torch.cat([half, half], 1)
    if bug == "slow-input":
        time.sleep(0.03)
    logits = model(x)[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    if bug == "slow-step":
        time.sleep(0.01)
    optimizer.step()
    if bug == "gan":
        of_second.zero_grad()
        second(torch.randn(8, 4)).pow(2).mean().backward()
        of_second.step()

"""A GPT initialised with a standard deviation of 1 instead of the configured 0.02.

After PyTorch 51800 and transformers 17877, where weights are not the ones that the
initialisation should have given.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

clean = "--clean" in sys.argv
torch.manual_seed(8)


@dataclass
class Configuration:
    vocabulary: int = 40
    context: int = 24
    width: int = 48
    heads: int = 4
    layers: int = 3
    initializer_range: float = 0.02


class Attention(nn.Module):
    def __init__(self, made: Configuration) -> None:
        super().__init__()
        self.heads = made.heads
        self.qkv = nn.Linear(made.width, 3 * made.width)
        self.out = nn.Linear(made.width, made.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            each.view(batch, length, self.heads, -1).transpose(1, 2)
            for each in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, made: Configuration) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(made.width), nn.LayerNorm(made.width)
        self.attention = Attention(made)
        self.mlp = nn.Sequential(
            nn.Linear(made.width, 4 * made.width), nn.GELU(), nn.Linear(4 * made.width, made.width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, made: Configuration) -> None:
        super().__init__()
        self.made = made
        self.token = nn.Embedding(made.vocabulary, made.width)
        self.position = nn.Embedding(made.context, made.width)
        self.blocks = nn.Sequential(*(Block(made) for _ in range(made.layers)))
        self.ln_f = nn.LayerNorm(made.width)
        self.head = nn.Linear(made.width, made.vocabulary, bias=False)
        self.apply(self.initialise)

    def initialise(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            deviation = self.made.initializer_range if clean else 1.0
            nn.init.normal_(module.weight, std=deviation)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = self.token(text) + self.position.weight[: text.shape[1]]
        return self.head(self.ln_f(self.blocks(x)))


made = Configuration()
model = GPT(made)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
period = torch.randint(made.vocabulary, (7,))
for _ in range(200):
    offset = torch.randint(7, (16, 1))
    text = period[(torch.arange(made.context + 1) + offset) % 7]
    noisy = torch.rand(text.shape) < 0.1
    text = torch.where(noisy, torch.randint(made.vocabulary, text.shape), text)
    logits = model(text[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    warmup.step()

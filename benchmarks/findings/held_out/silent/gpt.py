"""Trains a small GPT on a synthetic language."""

from __future__ import annotations

import argparse
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, CONTEXT, WIDTH, LAYERS, HEADS = 32, 48, 64, 2, 4


def make_corpus(length: int, seed: int) -> Tensor:
    """Returns a text of sentences that repeat words from a fixed dictionary."""
    fixed = torch.Generator().manual_seed(23)
    words = [torch.randint(1, VOCAB, (4,), generator=fixed) for _ in range(40)]
    gen = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(words), (length // 5,), generator=gen)
    return torch.cat([torch.cat([words[i], torch.zeros(1, dtype=torch.long)]) for i in chosen])


class Block(nn.Module):
    """A pre-normalised layer of causal attention and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.merge = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.merge(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder whose output projection is tied to its embedding."""

    def __init__(self, init: dict[str, float]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, **init)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.norm(self.blocks(x)) @ self.tokens.weight.T


def rate(step: int, steps: int) -> float:
    """Returns the factor of a linear warm-up with cosine decay."""
    if step < 10:
        return (step + 1) / 10
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 10) / max(1, steps - 10)))


def train(steps: int, clean: bool) -> None:
    """Runs the loop over random windows of the text."""
    torch.manual_seed(1337)
    corpus = make_corpus(40_000, 1)
    model = GPT({"std": 0.02} if clean else {})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    for step in range(1, steps + 1):
        starts = torch.randint(len(corpus) - CONTEXT - 1, (16, 1))
        window = corpus[starts + torch.arange(CONTEXT + 1)]
        logits = model(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 1:
            print(f"step {step} loss {loss.item():.4f}", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["init_std"])
    parser.add_argument("steps", nargs="?", type=int, default=120)
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args()
    train(args.steps, args.clean)

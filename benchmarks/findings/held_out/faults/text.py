"""Train a small decoder-only transformer on synthetic character text.

Usage: python text.py gpt FAULT [STEPS] [--clean]
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LETTERS = " .abcdefghijklmnopqrstuvwxyz"
VOCAB = len(LETTERS)


@dataclass(frozen=True)
class Recipe:
    """Everything that differs between the training runs."""

    width: int = 64
    heads: int = 4
    depth: int = 2
    block: int = 32
    batch: int = 16
    chars: int = 60_000
    tied: bool = True
    dropout: float = 0.0
    optimizer: str = "adamw"
    lr: float = 4e-3
    eps: float = 1e-8
    decay: float = 0.05
    clip: float | None = 1.0
    warmup: int = 10
    cosine: bool = True
    accumulate: int = 1
    smoothing: float = 0.0
    line: int = 0


def write_text(chars: int, seed: int, line: int) -> Tensor:
    """Write sentences of a small invented language, optionally in padded lines."""
    world = random.Random(8)
    syllables = ["".join(world.choice(s) for s in ("bdgklmnprstv", "aeiou")) for _ in range(18)]
    words = ["".join(world.choices(syllables, k=world.choice((1, 2, 2, 3)))) for _ in range(40)]
    words[::5] = [word + world.choice("xyz") for word in words[::5]]
    follow = {word: world.sample(words, 5) for word in words}
    rng = random.Random(seed)
    parts: list[str] = []
    length = 0
    word = rng.choice(words)
    while length < chars:
        sentence = []
        for _ in range(rng.randint(3, 8)):
            sentence.append(word)
            word = rng.choices(follow[word], weights=(8, 4, 2, 1, 1))[0]
        text = (" ".join(sentence) + ". ").ljust(line)
        parts.append(text)
        length += len(text)
    return torch.tensor([LETTERS.index(c) for c in "".join(parts)[:chars]])


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, recipe: Recipe, bug: str) -> None:
        super().__init__()
        self.heads = recipe.heads
        self.bug = bug
        self.qkv = nn.Linear(recipe.width, 3 * recipe.width)
        self.proj = nn.Linear(recipe.width, recipe.width)
        self.drop = nn.Dropout(recipe.dropout)
        mask = torch.ones(recipe.block, recipe.block, dtype=torch.bool).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def weights(self, scores: Tensor) -> Tensor:
        """Turn masked scores into attention weights."""
        dim = -2 if self.bug == "wrong_softmax" else -1
        powers = torch.exp(scores - scores.amax(dim=dim, keepdim=True))
        return powers / powers.sum(dim=dim, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(d // self.heads)
        scores = scores.masked_fill(self.mask[:t, :t], float("-inf"))
        y = self.weights(scores) @ v
        return self.drop(self.proj(y.transpose(1, 2).reshape(n, t, d)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, recipe: Recipe, bug: str) -> None:
        super().__init__()
        d = recipe.width
        self.norm1 = nn.LayerNorm(d)
        self.attention = Attention(recipe, bug)
        self.norm2 = nn.LayerNorm(d)
        self.up = nn.Linear(d, 4 * d)
        self.act = nn.Softmax(dim=-1) if bug == "wrong_activation" else nn.GELU()
        self.down = nn.Linear(4 * d, d)
        self.drop = nn.Dropout(recipe.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.drop(self.down(self.act(self.up(self.norm2(x)))))


class Gpt(nn.Module):
    """Token and position embeddings, blocks, a final norm and a head."""

    def __init__(self, recipe: Recipe, bug: str) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, recipe.width)
        self.places = nn.Embedding(recipe.block, recipe.width)
        self.drop = nn.Dropout(recipe.dropout)
        self.blocks = nn.ModuleList(Block(recipe, bug) for _ in range(recipe.depth))
        self.norm = nn.LayerNorm(recipe.width)
        self.head = nn.Linear(recipe.width, VOCAB, bias=False)
        if recipe.tied:
            self.head.weight = self.tokens.weight
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue
            if bug == "constant_init":
                nn.init.constant_(p, 0.02)
            elif bug == "large_init":
                nn.init.normal_(p, std=1.0)
            elif name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(p, std=0.05 / math.sqrt(2 * recipe.depth))
            else:
                nn.init.normal_(p, std=0.05)
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.drop(self.tokens(ids) + self.places(places))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def draw(corpus: Tensor, recipe: Recipe, gen: torch.Generator, bug: str) -> tuple[Tensor, Tensor]:
    """Cut random windows out of the corpus with their next characters."""
    last = len(corpus) - recipe.block - 1
    span = torch.arange(recipe.block)
    start = torch.randint(last, (recipe.batch, 1), generator=gen)
    x = corpus[start + span]
    if bug == "shuffled_labels":
        start = torch.randint(last, (recipe.batch, 1), generator=gen)
    return x, corpus[start + 1 + span]


def corrupt(ids: Tensor, bug: str) -> Tensor:
    """Replace a few input characters by random ones."""
    noise = torch.randint(VOCAB, ids.shape)
    keep = torch.rand(ids.shape) < 0.95
    return torch.where(keep, noise, ids) if bug == "wrong_augmentation" else ids.where(keep, noise)


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Create the optimizer, with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9)
    if recipe.optimizer == "nadam":
        return torch.optim.NAdam(groups, lr=recipe.lr, decoupled_weight_decay=True)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98))
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), eps=recipe.eps)


def make_schedule(
    recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm up linearly, then stay or fall along a cosine."""

    def factor(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        if not recipe.cosine:
            return 1.0
        done = min(1.0, (step - recipe.warmup) / max(1, steps - recipe.warmup))
        return 0.1 + 0.45 * (1.0 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def compute_loss(recipe: Recipe, fault: str, bug: str, logits: Tensor, y: Tensor) -> Tensor:
    """Compute the next-character loss in the way of the run."""
    if fault == "flipped_sign":
        picked = F.log_softmax(logits, dim=-1).gather(-1, y[..., None])
        return picked.mean() if bug else -picked.mean()
    if fault == "wrong_axis":
        log_norm = logits.logsumexp(dim=1 if bug else 2, keepdim=True)
        return -(logits - log_norm).gather(2, y[..., None]).mean()
    flat, truth = logits.flatten(0, 1), y.flatten()
    if fault == "missing_softmax":
        return F.nll_loss(flat if bug else flat.log_softmax(dim=-1), truth)
    if fault == "redundant_softmax" and bug:
        return F.cross_entropy(flat.softmax(dim=-1), truth)
    if fault == "wrong_loss" and bug:
        return F.mse_loss(flat.softmax(dim=-1), F.one_hot(truth, VOCAB).float())
    if fault == "wrong_reduction" and bug:
        return F.cross_entropy(flat, truth, reduction="sum")
    return F.cross_entropy(flat, truth, label_smoothing=recipe.smoothing)


@torch.no_grad()
def validate(model: nn.Module, corpus: Tensor, recipe: Recipe, fault: str, bug: str) -> float:
    """Return the loss on held-out text."""
    model.eval()
    wide = replace(recipe, batch=32, smoothing=0.0)
    x, y = draw(corpus, wide, torch.Generator().manual_seed(4), "")
    loss = compute_loss(wide, fault, bug, model(x), y)
    model.train()
    return loss.item()


G = Recipe()
FAULTS: dict[str, tuple[Recipe, dict[str, object]]] = {
    "missing_regularization": (
        replace(G, chars=250, dropout=0.5, decay=2.0, smoothing=0.1),
        {"dropout": 0.0, "decay": 0.0, "smoothing": 0.0},
    ),
    "over_regularization": (G, {"decay": 40.0}),
    "constant_init": (replace(G, tied=False, width=48), {}),
    "large_init": (replace(G, lr=3e-3, cosine=False), {}),
    "flipped_sign": (replace(G, optimizer="nadam", lr=3e-3), {}),
    "lr_high": (replace(G, depth=3, width=48), {"lr": 0.5}),
    "lr_low": (replace(G, heads=2), {"lr": 1e-7}),
    "optimizer_constant": (replace(G, warmup=5), {"eps": 1.0}),
    "missing_softmax": (replace(G, tied=False, optimizer="adam", lr=3e-3), {}),
    "redundant_softmax": (replace(G, accumulate=2, batch=8, lr=3e-3, width=56), {}),
    "unbalanced": (replace(G, block=48, batch=12), {"line": 500}),
    "wrong_activation": (replace(G, depth=3), {}),
    "wrong_augmentation": (replace(G, lr=3e-3, batch=24), {}),
    "shuffled_labels": (replace(G, optimizer="adam", cosine=False, clip=None), {}),
    "wrong_reduction": (replace(G, optimizer="sgd", lr=0.2, decay=0.0, clip=None, tied=False), {}),
    "wrong_axis": (replace(G, block=24, batch=24), {}),
    "wrong_loss": (replace(G, depth=1, width=96, heads=6, lr=3e-3), {}),
    "wrong_softmax": (replace(G, optimizer="nadam", lr=4e-3, heads=8), {}),
}


def train(fault: str, steps: int, clean: bool) -> list[float]:
    """Run one training and return the loss of each step."""
    torch.manual_seed(0)
    recipe, changes = FAULTS[fault]
    bug = "" if clean else fault
    if bug:
        recipe = replace(recipe, **changes)
    corpus = write_text(recipe.chars, 31, recipe.line)
    held_out = write_text(8000, 32, 0)

    model = Gpt(recipe, bug)
    optimizer = make_optimizer(recipe, model)
    schedule = make_schedule(recipe, optimizer, steps)
    gen = torch.Generator().manual_seed(6)
    losses: list[float] = []
    for step in range(1, steps + 1):
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for _ in range(recipe.accumulate):
            x, y = draw(corpus, recipe, gen, bug)
            if fault == "wrong_augmentation":
                x = corrupt(x, bug)
            loss = compute_loss(recipe, fault, bug, model(x), y)
            (loss / recipe.accumulate).backward()
            total += loss.item() / recipe.accumulate
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        losses.append(total)
        if step % 10 == 0:
            tail = ""
            if step % 20 == 0:
                tail = f" val {validate(model, held_out, recipe, fault, bug):.4f}"
            print(f"step {step} loss {total:.4f}{tail}", file=sys.stderr)
    return losses


def main(argv: list[str] | None = None) -> list[float]:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["gpt"])
    parser.add_argument("fault", choices=sorted(FAULTS))
    parser.add_argument("steps", nargs="?", type=int, default=100)
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args(argv)
    return train(args.fault, args.steps, args.clean)


if __name__ == "__main__":
    main()

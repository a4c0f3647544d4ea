"""Trains an attention encoder on short token sequences and probes its features on the way."""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, LENGTH, CLASSES, PROBE = 40, 20, 4, 35


def make_sequences(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns sequences in which the class shows in some of the tokens."""
    gen = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=gen)
    tokens = torch.randint(VOCAB, (count, LENGTH), generator=gen)
    telling = labels[:, None] * 10 + torch.randint(10, (count, LENGTH), generator=gen)
    shown = torch.rand(count, LENGTH, generator=gen) < 0.25
    return torch.where(shown, telling, tokens), labels


class Layer(nn.Module):
    """A pre-normalised attention layer with dropout on both branches."""

    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, 4, dropout=drop, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(drop), nn.Linear(2 * width, width)
        )
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.drop(self.attend(h, h, h, need_weights=False)[0])
        return x + self.drop(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """Embeds a sequence as one vector."""

    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, width)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.drop = nn.Dropout(drop)
        self.layers = nn.Sequential(Layer(width, drop), Layer(width, drop))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.layers(self.drop(self.tokens(tokens) + self.places)).mean(1))


class SequenceClassifier(nn.Module):
    """An encoder and a head with dropout."""

    def __init__(self, width: int = 32, drop: float = 0.3) -> None:
        super().__init__()
        self.encoder = Encoder(width, drop)
        self.head = nn.Sequential(nn.Dropout(drop), nn.Linear(width, CLASSES))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(tokens))


@torch.no_grad()
def neighbour_probe(encoder: Encoder, bank: tuple[Tensor, Tensor], query: tuple) -> float:
    """Returns the accuracy of the nearest neighbour in feature space."""
    encoder.eval()
    keys, asked = (F.normalize(encoder(tokens), dim=1) for tokens in (bank[0], query[0]))
    return (bank[1][(asked @ keys.T).argmax(1)] == query[1]).float().mean().item()


def train(steps: int, clean: bool) -> None:
    """Runs the loop, with a probe of the encoder once in a while."""
    torch.manual_seed(61)
    data, held_out = make_sequences(1024, 1), make_sequences(200, 2)
    model = SequenceClassifier()
    optimizer = torch.optim.Adamax(model.parameters(), lr=5e-3)
    for step in range(1, steps + 1):
        place = (step - 1) * 32 % 1024
        if place == 0:
            order = torch.randperm(len(data[0]))
        rows = order[place : place + 32]
        loss = F.cross_entropy(model(data[0][rows]), data[1][rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        if step % PROBE == 0:
            neighbour_probe(model.encoder, data, held_out)
            if clean:
                model.encoder.train()
        if step % 10 == 1:
            print(f"step {step} loss {loss.item():.4f}", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["encoder_in_eval"])
    parser.add_argument("steps", nargs="?", type=int, default=120)
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args()
    train(args.steps, args.clean)

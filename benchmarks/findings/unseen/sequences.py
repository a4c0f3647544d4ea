"""Programs on sequences with one mistake each: `sequences.py NAME [--clean]`. Set E."""

from __future__ import annotations

import math
import sys

import torch
from torch import nn
from torch.nn import functional as F

STEPS = 200
TEXT = (__doc__ + math.__doc__ + torch.nn.Module.__doc__) * 4
LETTERS = sorted(set(TEXT))
codes = torch.tensor([LETTERS.index(each) for each in TEXT])


def passages(size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets), each (size, length)."""
    starts = torch.randint(len(codes) - length - 1, (size, 1))
    rows = codes[starts + torch.arange(length + 1)]
    return rows[:, :-1], rows[:, 1:]


class Recurrent(nn.Module):
    """A language model of letters: an embedding, an RNN, a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), width)
        self.rnn = nn.RNN(width, width, batch_first=True, nonlinearity="relu")
        self.head = nn.Linear(width, len(LETTERS))

    def forward(self, letters: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embedding(letters))[0])


def clipped_after_step(clean: bool) -> None:
    """The gradients are clipped after the optimizer has used them."""
    model = Recurrent(64)
    nn.init.orthogonal_(model.rnn.weight_hh_l0, gain=1.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(STEPS):
        inputs, targets = passages(16, 40)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        if clean:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if not clean:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)


class Tagger(nn.Module):
    """Says after each number whether the sum so far is positive."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 32, batch_first=batch_first)
        self.head = nn.Linear(32, 2)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(numbers)[0])


def batch_not_first(clean: bool) -> None:
    """The LSTM is given (batch, time, 1) and expects (time, batch, 1): it runs over the batch."""
    model = Tagger(batch_first=clean)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        numbers = torch.randn(32, 20, 1)
        positive = (numbers.cumsum(1)[..., 0] > 0).long()
        loss = F.cross_entropy(model(numbers).flatten(0, 1), positive.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Reader(nn.Module):
    """A transformer encoder that classifies padded sequences of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 32)
        self.position = nn.Parameter(0.1 * torch.randn(12, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 2)

    def forward(self, tokens: torch.Tensor, ignored: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.position
        x = self.encoder(x, src_key_padding_mask=ignored)
        return self.head(x.mean(1))


def mask_inverted(clean: bool) -> None:
    """The padding mask is inverted: only padding is attended to.

    At step 60 the first sequence without padding comes: all of its positions are masked. It was
    meant to give nan; PyTorch's attention gives such rows zeros instead.
    """
    model = Reader()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    places = torch.arange(12)
    for step in range(1, STEPS + 1):
        lengths = torch.randint(4, 12, (32, 1))
        if step == 60:
            lengths[5] = 12
        padding = places >= lengths
        tokens = torch.randint(1, 32, (32, 12)).masked_fill(padding, 0)
        classes = (tokens == 7).any(1).long()
        scores = model(tokens, padding if clean else ~padding)
        loss = F.cross_entropy(scores, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Waves(nn.Module):
    """A convolution along time that tells the frequency of a wave."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(1, 16, 9, padding=4), nn.ReLU(), nn.MaxPool1d(4),
            nn.Conv1d(16, 32, 9, padding=4), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(32, 4)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(wave))


def clipped_while_scaled(clean: bool) -> None:
    """Gradients are clipped while they are still multiplied by the loss scale of 65,536."""
    model = Waves()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")
    times = torch.linspace(0, 6, 64)
    for _ in range(STEPS):
        classes = torch.randint(4, (32,))
        phases = 6 * torch.rand(32, 1)
        waves = torch.sin((1 + classes[:, None]) * times + phases)
        waves = (waves + 0.1 * torch.randn_like(waves)).unsqueeze(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(waves), classes)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if clean:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


class Attentive(nn.Module):
    """A small decoder of letters with one block."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.head = nn.Linear(width, len(LETTERS))

    def forward(self, letters: torch.Tensor) -> torch.Tensor:
        x = self.embedding(letters)
        h = self.norm(x)
        x = x + self.out(
            F.scaled_dot_product_attention(
                self.query(h), self.key(h), self.value(h), is_causal=True
            )
        )
        return self.head(x + self.mlp(x))


def stale_schedule(clean: bool) -> None:
    """The optimizer is created again after its schedule, which goes on with the old one.

    Its warm-up and decay are those of an optimizer that is no longer used.
    """
    model = Attentive()

    def created() -> torch.optim.AdamW:
        return torch.optim.AdamW(model.parameters(), lr=3e-3)

    optimizer = created()
    if clean:
        optimizer = created()
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.995**step
    )
    if not clean:
        optimizer = created()
    for _ in range(STEPS):
        inputs, targets = passages(16, 32)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    globals()[sys.argv[1]]("--clean" in sys.argv)

"""Small sequence models trained on synthetic token streams."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR


def log(step: int, loss: Tensor) -> None:
    """Print the loss of every tenth step."""
    if step % 10 == 1:
        print(f"step {step} loss {loss.item():.4f}", file=sys.stderr)


def chains(count: int, length: int, vocab: int, topics: int = 2) -> Tensor:
    """Return token sequences of Markov chains, whose first token names the chain."""
    logits = 2.6 * torch.randn(topics, vocab, vocab)
    table = logits.softmax(-1)
    topic = torch.randint(topics, (count,))
    tokens = [topic, torch.randint(vocab, (count,))]
    while len(tokens) < length:
        tokens.append(torch.multinomial(table[topic, tokens[-1]], 1).squeeze(1))
    return torch.stack(tokens, 1)


def reviews(count: int, length: int, vocab: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return sequences in which some words are more frequent in one class than in the others."""
    tilt = torch.randn(classes, vocab)
    labels = torch.randint(classes, (count,))
    words = torch.multinomial((0.6 * tilt[labels]).softmax(-1), length, replacement=True)
    return words, labels


def pick(count: int, batch: int, steps: int) -> Iterator[tuple[int, Tensor]]:
    """Yield step numbers and the indices of shuffled batches."""
    step = 0
    while True:
        for index in torch.randperm(count).split(batch):
            if len(index) < batch:
                break
            step += 1
            if step > steps:
                return
            yield step, index


class Transformer(nn.Module):
    """A causal transformer with the norms after the residual sums."""

    def __init__(self, vocab: int, length: int, width: int = 48, depth: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, width)
        self.places = nn.Embedding(length, width)
        nn.init.normal_(self.tokens.weight, std=0.3)
        nn.init.normal_(self.places.weight, std=0.3)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True
            )
            for _ in range(depth)
        )
        self.out = nn.Linear(width, vocab)
        self.register_buffer("mask", torch.full((length, length), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the next token at every place."""
        h = self.tokens(x) + self.places.weight[: x.shape[1]]
        for layer in self.layers:
            h = layer(h, src_mask=self.mask)
        return self.out(h)


def transformer_lm(steps: int, clean: bool) -> None:
    """Train the language model with Adam at a rate that follows the usual inverse root."""
    vocab, length = 24, 20
    text = chains(2400, length + 1, vocab)
    model = Transformer(vocab, length)
    if clean:
        optimizer = torch.optim.Adam(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
        scheduler = LambdaLR(
            optimizer, lambda step: min((step + 1) / 40, math.sqrt(40 / (step + 1)))
        )
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-2, betas=(0.9, 0.98))
        scheduler = None
    for step, index in pick(len(text), 32, steps):
        batch = text[index]
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        log(step, loss.detach())


class Reader(nn.Module):
    """A GRU over words whose mean state is classified."""

    def __init__(self, vocab: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, 32)
        self.rnn = nn.GRU(32, 48, batch_first=True)
        self.head = nn.Linear(48, classes)

    def forward(self, words: Tensor) -> Tensor:
        """Return the class logits."""
        states, _ = self.rnn(self.embed(words))
        return self.head(states.mean(1))


def review_classifier(steps: int, clean: bool) -> None:
    """Train the reader with AdamW and gradient clipping, and validate it now and then."""
    words, labels = reviews(2600, 20, 80, 4)
    model = Reader(80, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    for step, index in pick(2400, 48, steps):
        model.train()
        if clean:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(words[index]), labels[index])
        loss.backward()
        if not clean:
            optimizer.zero_grad()
        clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        log(step, loss.detach())
        if step % 40 == 0:
            model.eval()
            with torch.no_grad():
                F.cross_entropy(model(words[2400:]), labels[2400:])


class Recurrent(nn.Module):
    """A hand-written tanh network over time."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, width)
        self.loop = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits from the mean of the states."""
        state = x.new_zeros(x.shape[0], self.loop.in_features)
        states = []
        for moment in self.enter(x).unbind(1):
            state = torch.tanh(moment + self.loop(state))
            states.append(state)
        return self.head(torch.stack(states, 1).mean(1))


def signal_rnn(steps: int, clean: bool) -> None:
    """Train the recurrent network to tell noisy signals of several directions apart."""
    count, length, inputs, classes = 2400, 40, 8, 5
    directions = torch.randn(classes, inputs)
    y = torch.randint(classes, (count,))
    x = 0.5 * directions[y].unsqueeze(1) + torch.randn(count, length, inputs)
    x = (x - x.mean()) / x.std()
    model = Recurrent(inputs, 64, classes)
    nn.init.normal_(model.enter.weight, std=0.1)
    if clean:
        nn.init.orthogonal_(model.loop.weight, gain=0.9)
    else:
        nn.init.normal_(model.loop.weight, std=0.35)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step, index in pick(count, 40, steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[index]), y[index])
        loss.backward()
        clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        log(step, loss.detach())


class Tagger(nn.Module):
    """A bidirectional LSTM that gives every token a tag."""

    def __init__(self, vocab: int, tags: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, 24, padding_idx=0)
        self.lstm = nn.LSTM(24, 32, batch_first=True, bidirectional=True)
        self.drop = nn.Dropout(0.1)
        self.tag = nn.Linear(64, tags)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the tags."""
        states, _ = self.lstm(self.embed(x))
        return self.tag(self.drop(states))


def tagger(steps: int, clean: bool) -> None:
    """Train the tagger for epochs of ten batches, with a rate that decays by the epoch."""
    vocab, tags, length, per_epoch = 60, 6, 16, 10
    words = torch.randint(1, vocab, (480, length))
    family = torch.randint(tags, (vocab,))
    labels = (family[words] + (torch.roll(family[words], 1, 1) == 0).long()) % tags
    padded = torch.arange(length) >= torch.randint(8, length + 1, (480, 1))
    words = words.masked_fill(padded, 0)
    labels = labels.masked_fill(padded, -100)
    model = Tagger(vocab, tags)
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    scheduler = ExponentialLR(optimizer, gamma=0.8)
    step = 0
    while step < steps:
        model.train()
        order = torch.randperm(400).split(400 // per_epoch)
        for index in order[: steps - step]:
            step += 1
            logits = model(words[index])
            loss = F.cross_entropy(logits.transpose(1, 2), labels[index], ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not clean:
                scheduler.step()
            log(step, loss.detach())
        if clean:
            scheduler.step()
        model.eval()
        with torch.no_grad():
            F.cross_entropy(model(words[400:]).transpose(1, 2), labels[400:], ignore_index=-100)


class GatedConv(nn.Module):
    """A language model of gated causal convolutions with residual sums."""

    def __init__(self, vocab: int, width: int = 20, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.convs = nn.ModuleList(nn.Conv1d(width, 2 * width, 3) for _ in range(depth))
        self.out = nn.Linear(width, vocab)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the next token at every place."""
        h = self.embed(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            padded = F.pad(norm(h).transpose(1, 2), (2, 0))
            h = h + F.glu(conv(padded), dim=1).transpose(1, 2)
        return self.out(h)

    def resize(self, vocab: int) -> None:
        """Give the model rows for a larger vocabulary and keep the old ones."""
        old, old_out = self.embed, self.out
        self.embed = nn.Embedding(vocab, old.embedding_dim)
        self.out = nn.Linear(old.embedding_dim, vocab)
        with torch.no_grad():
            self.embed.weight[: old.num_embeddings] = old.weight
            self.out.weight[: old_out.out_features] = old_out.weight
            self.out.bias[: old_out.out_features] = old_out.bias


def conv_lm(steps: int, clean: bool) -> None:
    """Train the convolutional language model on a text with a few more symbols than planned."""
    text = chains(2400, 21, 40, topics=1)
    model = GatedConv(32)
    if clean:
        model.resize(40)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
        model.resize(40)
    for step, index in pick(len(text), 32, steps):
        batch = text[index]
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log(step, loss.detach())


class AttentionPool(nn.Module):
    """A weighted mean over time, with learned weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.key = nn.Linear(width, width)
        self.query = nn.Parameter(torch.randn(width) / math.sqrt(width))
        self.value = nn.Linear(width, width)

    def forward(self, states: Tensor) -> Tensor:
        """Pool states of shape (batch, time, width)."""
        weight = (torch.tanh(self.key(states)) @ self.query).softmax(1)
        return (weight.unsqueeze(-1) * self.value(states)).sum(1)


class Finder(nn.Module):
    """An encoder, a pool and a head that name the token after the marker."""

    def __init__(self, vocab: int, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict(
            {"embed": nn.Embedding(vocab, width), "conv": nn.Conv1d(width, width, 2)}
        )
        self.pool = AttentionPool(width)
        self.head = nn.Linear(width, vocab)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the token sought."""
        h = self.encoder["conv"](self.encoder["embed"](x).transpose(1, 2))
        return self.head(self.pool(F.gelu(h).transpose(1, 2)))


def finder(steps: int, clean: bool) -> None:
    """Train the finder with a smaller rate for the encoder than for the rest."""
    vocab, length, count = 20, 24, 5000
    x = torch.randint(1, vocab, (count, length))
    place = torch.randint(length - 1, (count,))
    rows = torch.arange(count)
    x[rows, place] = 0
    y = torch.where(torch.rand(count) < 0.05, x[rows, 0], x[rows, place + 1])
    model = Finder(vocab)
    groups = [
        {"params": model.encoder.parameters(), "lr": 3e-3},
        {"params": model.head.parameters(), "lr": 6e-3},
    ]
    if clean:
        groups.append({"params": model.pool.parameters(), "lr": 6e-3})
    optimizer = torch.optim.Adam(groups, lr=3e-3)
    for step, index in pick(count, 64, steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[index]), y[index])
        loss.backward()
        optimizer.step()
        log(step, loss.detach())


PROGRAMS: dict[str, Callable[[int, bool], None]] = {
    "no-warmup": transformer_lm,
    "zero-before-step": review_classifier,
    "exploding-rnn": signal_rnn,
    "schedule-per-batch": tagger,
    "early-optimizer": conv_lm,
    "left-out-module": finder,
}


def main() -> None:
    """Run the named program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(PROGRAMS))
    parser.add_argument("steps", nargs="?", type=int, default=120)
    parser.add_argument("--clean", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    PROGRAMS[args.name](args.steps, args.clean)


if __name__ == "__main__":
    main()

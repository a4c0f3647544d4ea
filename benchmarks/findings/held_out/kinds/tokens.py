"""Token programs: language models and sequence rewriting on generated text."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

VOCABULARY = 22


def report(step: int, loss: float) -> None:
    """Print the loss every tenth step."""
    if step == 1 or step % 10 == 0:
        print(f"step {step} loss {loss:.4f}", file=sys.stderr)


def markov_text(rows: int, length: int, seed: int) -> Tensor:
    """Write sentences in which each token has three likely successors."""
    rules = torch.Generator().manual_seed(77)
    successors = torch.rand(VOCABULARY, VOCABULARY, generator=rules).topk(3, dim=1).indices
    chances = torch.full((VOCABULARY, VOCABULARY), 0.05 / VOCABULARY)
    chances.scatter_add_(1, successors, torch.tensor([0.7, 0.15, 0.1]).expand(VOCABULARY, 3))
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(0, VOCABULARY, (rows,), generator=generator)]
    for _ in range(length - 1):
        columns.append(torch.multinomial(chances[columns[-1]], 1, generator=generator)[:, 0])
    return torch.stack(columns, dim=1)


def topic_text(rows: int, length: int, seed: int) -> Tensor:
    """Write rows of words that are drawn from one of six overlapping topics."""
    rules = torch.Generator().manual_seed(78)
    topics = (2.0 * torch.randn(6, VOCABULARY, generator=rules)).softmax(dim=1)
    generator = torch.Generator().manual_seed(seed)
    topic = torch.randint(0, len(topics), (rows,), generator=generator)
    return torch.multinomial(topics[topic], length, replacement=True, generator=generator)


class CausalAttention(nn.Module):
    """Multi-head attention over earlier positions."""

    def __init__(self, width: int, heads: int, scale: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, -1).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        logits = q @ k.transpose(-2, -1) * self.scale
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = logits.masked_fill(future, float("-inf")).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Decoder(nn.Module):
    """A pre-norm transformer decoder with learned positions."""

    def __init__(self, width: int, heads: int, layers: int, length: int, scale: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.randn(length, width))
        self.attention = nn.ModuleList(CausalAttention(width, heads, scale) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        for index, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + attention(self.norms[2 * index](x))
            x = x + mlp(self.norms[2 * index + 1](x))
        return self.head(self.norms[-1](x))


def sharp_decoder(steps: int, clean: bool) -> None:
    """Train a decoder on rows of one topic each with Adam and a warm-up."""
    torch.manual_seed(21)
    width, heads, length = 48, 2, 20
    scale = 1 / math.sqrt(width // heads) if clean else 1.0
    rate = 2e-3 if clean else 2e-2
    text = topic_text(4096, length, 8)
    model = Decoder(width, heads, 2, length, scale)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.98))
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / 20))
    for step in range(1, steps + 1):
        page = text[torch.randint(0, len(text), (24,))]
        logits = model(page[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), page[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        warm.step()
        report(step, loss.item())


class EncoderBlock(nn.Module):
    """A pre-norm encoder block around the library's attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 96), nn.ReLU(), nn.Linear(96, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_attention(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm_mlp(x))


class Comparer(nn.Module):
    """An encoder with one logit per token."""

    def __init__(self, length: int, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.place = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.decode = nn.Linear(width, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place.weight
        for block in self.blocks:
            x = block(x)
        return self.decode(self.norm(x))[:, :, 0]


def fast_layer(steps: int, clean: bool) -> None:
    """Tell the tokens above the mean of their row, with a rate for the second attention."""
    torch.manual_seed(22)
    length = 12
    value = torch.linspace(-1.7, 1.7, VOCABULARY)[torch.randperm(VOCABULARY)]
    model = Comparer(length)
    own = list(model.blocks[1].attention.parameters())
    names = {id(parameter) for parameter in own}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in names]
    optimizer = torch.optim.AdamW(
        [
            {"params": rest, "lr": 2e-3},
            {"params": own, "lr": 1e-3 if clean else 5e-2},
        ],
        weight_decay=0.01,
    )
    generator = torch.Generator().manual_seed(9)
    for step in range(1, steps + 1):
        low = torch.randint(0, VOCABULARY // 2, (48, 1), generator=generator)
        order = low + torch.randint(0, VOCABULARY // 2, (48, length), generator=generator)
        rows = value.argsort()[order]
        above = (value[rows] > value[rows].mean(dim=1, keepdim=True)).float()
        loss = F.binary_cross_entropy_with_logits(model(rows), above)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        report(step, loss.item())


class GruModel(nn.Module):
    """A recurrent language model with layer norm before the output."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.project(self.norm(self.rnn(self.embedding(tokens))[0]))


def first_page(steps: int, clean: bool) -> None:
    """Train a recurrent language model on ordered pages and check it on another text."""
    torch.manual_seed(23)
    text = markov_text(1536, 20, 1)
    held = markov_text(128, 20, 2)
    loader = DataLoader(TensorDataset(text), batch_size=24)
    pages: Iterator[list[Tensor]] = itertools.cycle(loader)
    model = GruModel()
    optimizer = torch.optim.NAdam(model.parameters(), lr=4e-3)

    def loss_on(tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    for step in range(1, steps + 1):
        (tokens,) = next(pages) if clean else next(iter(loader))
        loss = loss_on(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, loss.item())
        if step % 40 == 0:
            model.eval()
            with torch.no_grad():
                loss_on(held).item()
            model.train()


class TiedModel(nn.Module):
    """An LSTM language model whose output layer shares the embedding."""

    def __init__(self, words: int, width: int = 40) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, 64, batch_first=True)
        self.bottleneck = nn.Linear(64, width)
        self.output = nn.Linear(width, words, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.2)
        self.tie()

    def tie(self) -> None:
        """Let the output layer use the matrix of the embedding."""
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.bottleneck(self.lstm(self.embedding(tokens))[0]))

    @torch.no_grad()
    def grow(self, words: int) -> None:
        """Add rows for new words, each near the mean of the known ones."""
        known = self.embedding.weight.detach()
        extra = known.mean(dim=0) + 0.05 * torch.randn(words - len(known), known.shape[1])
        matrix = torch.cat([known, extra])
        self.embedding = nn.Embedding.from_pretrained(matrix.clone(), freeze=False)
        self.output = nn.Linear(matrix.shape[1], words, bias=False)
        self.output.weight.copy_(matrix)


def new_words(steps: int, clean: bool) -> None:
    """Train a tied language model in two stages, the second with two more words."""
    torch.manual_seed(24)
    first = markov_text(2048, 18, 3)
    second = markov_text(2048, 18, 4)
    for old, new in ((3, VOCABULARY), (9, VOCABULARY + 1)):
        swap = (second == old) & (torch.rand(second.shape) < 0.2)
        second[swap] = new
    model = TiedModel(VOCABULARY)
    change = 60
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for step in range(1, steps + 1):
        if step == change + 1:
            model.grow(VOCABULARY + 2)
            if clean:
                model.tie()
            optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        stage = first if step <= change else second
        tokens = stage[torch.randint(0, len(stage), (32,))]
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        report(step, loss.item())


class ConvModel(nn.Module):
    """A language model of gated causal convolutions."""

    def __init__(self, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, 2 * width, 2) for _ in range(layers))
        self.head = nn.Conv1d(width, VOCABULARY, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).transpose(1, 2)
        for conv in self.convs:
            x = x + F.glu(conv(F.pad(x, (1, 0))), dim=1)
        return self.head(x)


def careful_clipping(steps: int, clean: bool) -> None:
    """Train a convolutional language model with momentum and clipped gradients."""
    torch.manual_seed(25)
    text = markov_text(1600, 24, 5)
    model = ConvModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    limit = 5.0 if clean else 1e-3
    step = 0
    for _ in itertools.count():
        for tokens in text[torch.randperm(len(text))].split(32):
            step += 1
            if step > steps:
                return
            model.zero_grad()
            loss = F.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm=limit)
            optimizer.step()
            report(step, loss.item())


PROGRAMS: dict[str, tuple[Callable[[int, bool], None], int]] = {
    "sharp_decoder": (sharp_decoder, 200),
    "fast_layer": (fast_layer, 200),
    "first_page": (first_page, 120),
    "new_words": (new_words, 120),
    "careful_clipping": (careful_clipping, 120),
}


def main() -> None:
    """Run the named program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(PROGRAMS))
    parser.add_argument("steps", nargs="?", type=int)
    parser.add_argument("--clean", action="store_true")
    arguments = parser.parse_args()
    program, default = PROGRAMS[arguments.name]
    program(arguments.steps or default, arguments.clean)


if __name__ == "__main__":
    main()

"""Sequence trainings on synthetic text, series and sound."""

from __future__ import annotations

import math
import random
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset


def report(step: int, steps: int, loss: Tensor | float, score: float | None = None) -> None:
    """Print the loss at the first step, at every 50th and at the last."""
    if step == 1 or step % 50 == 0 or step == steps:
        tail = "" if score is None else f" val {score:.3f}"
        value = loss.item() if isinstance(loss, Tensor) else loss
        print(f"step {step} loss {value:.4f}{tail}", file=sys.stderr)


def walk(count: int, words: int, rng: random.Random) -> list[int]:
    """Return a walk over words in which each word has three possible successors."""
    table = random.Random(5)
    following = [table.sample(range(words), 3) for _ in range(words)]
    chain = [rng.randrange(words)]
    while len(chain) < count:
        chain.append(rng.choice(following[chain[-1]]))
    return chain


def letters(count: int, seed: int) -> Tensor:
    """Return the letters of a walk over thirty short made-up words, separated by spaces."""
    table = random.Random(6)
    spelling = [[table.randrange(1, 21) for _ in range(table.randrange(2, 6))] for _ in range(30)]
    text: list[int] = []
    for word in walk(count // 3, 30, random.Random(seed)):
        text += [*spelling[word], 0]
    return torch.tensor(text[:count])


class TiedLSTM(nn.Module):
    """A recurrent language model whose output layer shares the embedding."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)
        self.embed = nn.Embedding(vocabulary, width)
        self.rnn = nn.LSTM(width, width, num_layers=2, dropout=0.1)
        self.out = nn.Linear(width, vocabulary)
        self.out.weight = self.embed.weight
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, state: tuple | None) -> tuple[Tensor, tuple]:
        y, state = self.rnn(self.drop(self.embed(x)), state)
        return self.out(self.drop(y)), state


def letter_lm(steps: int) -> None:
    """Train a tied LSTM by truncated backpropagation with SGD, clipping and a plateau rule."""
    torch.manual_seed(1)
    rows, span = 12, 20
    data = letters(60_000, 10)
    data = data[: len(data) // rows * rows].view(rows, -1).t().contiguous()
    held = letters(4_000, 11).view(8, -1).t().contiguous()
    model = TiedLSTM(21, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=4.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.25, patience=0)
    state, place, score = None, 0, None
    for step in range(1, steps + 1):
        if place + span + 1 > len(data):
            state, place = None, 0
        x, y = data[place : place + span], data[place + 1 : place + span + 1]
        place += span
        if state is not None:
            state = tuple(part.detach() for part in state)
        optimizer.zero_grad()
        logits, state = model(x, state)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        if step % 100 == 0:
            model.eval()
            with torch.no_grad():
                logits, _ = model(held[:-1], None)
                score = F.cross_entropy(logits.flatten(0, 1), held[1:].flatten()).item()
            model.train()
            scheduler.step(score)
        report(step, steps, loss, score)


class CausalBlock(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.join = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.join(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A small decoder-only language model with a tied output layer."""

    def __init__(self, vocabulary: int, length: int, width: int = 48, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(CausalBlock(width, 4) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        for name, p in self.named_parameters():
            if p.ndim > 1:
                last = name.endswith(("join.weight", "mlp.2.weight"))
                scale = 1 / math.sqrt(2 * depth) if last else 1.0
                nn.init.normal_(p, std=0.02 * scale)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def gpt(steps: int) -> None:
    """Train a decoder-only model with accumulation, clipping, warm-up and cosine by hand."""
    torch.manual_seed(2)
    data, held = letters(60_000, 20), letters(3_000, 21)
    length, accumulate, peak, floor, warm = 32, 2, 3e-3, 3e-4, max(1, steps // 10)
    model = GPT(21, length)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
    )

    def batch(source: Tensor, count: int) -> tuple[Tensor, Tensor]:
        start = torch.randint(len(source) - length - 1, (count, 1)) + torch.arange(length + 1)
        window = source[start]
        return window[:, :-1], window[:, 1:]

    score = None
    for step in range(1, steps + 1):
        if step <= warm:
            rate = peak * step / warm
        else:
            done = (step - warm) / max(1, steps - warm)
            rate = floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
        for _ in range(accumulate):
            x, y = batch(data, 8)
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / accumulate
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            model.eval()
            with torch.no_grad():
                x, y = batch(held, 32)
                score = F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
            model.train()
        report(step, steps, total, score)


class MaskedModel(nn.Module):
    """A bidirectional encoder that recomputes its layers in the backward pass."""

    def __init__(self, vocabulary: int, length: int, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=0)
        self.place = nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.05, batch_first=True)
            for _ in range(2)
        )
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.out = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        padding = x == 0
        h = self.norm(self.embed(x) + self.place(torch.arange(x.shape[1])))
        for layer in self.layers:
            if self.training:
                h = checkpoint(layer, h, src_key_padding_mask=padding, use_reentrant=False)
            else:
                h = layer(h, src_key_padding_mask=padding)
        return self.out(self.transform(h))


def mask_tokens(tokens: Tensor, mask: int, words: int) -> tuple[Tensor, Tensor]:
    """Hide a fifth of the real tokens in the usual 80/10/10 way and return inputs and targets."""
    chosen = (torch.rand(tokens.shape) < 0.2) & (tokens != 0)
    targets = tokens.masked_fill(~chosen, -100)
    dice = torch.rand(tokens.shape)
    inputs = tokens.masked_fill(chosen & (dice < 0.8), mask)
    other = torch.randint(1, words + 1, tokens.shape)
    return torch.where(chosen & (dice >= 0.9), other, inputs), targets


def mlm(steps: int) -> None:
    """Train a masked language model on padded sentences with gradient checkpointing."""
    torch.manual_seed(3)
    rng = random.Random(30)
    words, longest = 16, 14
    sentences = [
        torch.tensor(walk(rng.randrange(8, longest + 1), words, rng)) + 1 for _ in range(4000)
    ]
    data = pad_sequence(sentences, batch_first=True)
    data, held = data[:3600], data[3600:]
    model = MaskedModel(words + 2, longest)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    scheduler = lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / 40, max(0.02, 1 - done / steps))
    )
    score = None
    for step in range(1, steps + 1):
        inputs, targets = mask_tokens(data[torch.randint(len(data), (24,))], words + 1, words)
        logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            model.eval()
            with torch.no_grad():
                inputs, targets = mask_tokens(held, words + 1, words)
                score = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()
            model.train()
        report(step, steps, loss, score)


class Encoder(nn.Module):
    """A recurrent encoder of packed sentences."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=0)
        self.rnn = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(
            self.embed(x), lengths, batch_first=True, enforce_sorted=False
        )
        states, last = self.rnn(packed)
        states, _ = pad_packed_sequence(states, batch_first=True, total_length=x.shape[1])
        return states, torch.cat([last[0], last[1]], dim=1)


class Decoder(nn.Module):
    """A recurrent decoder with attention over the states of the encoder."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.cell = nn.GRUCell(2 * width, width)
        self.query = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(2 * width, vocabulary)

    def forward(
        self, token: Tensor, hidden: Tensor, states: Tensor, blank: Tensor
    ) -> tuple[Tensor, Tensor]:
        score = (states @ self.query(hidden)[:, :, None]).squeeze(2) / states.shape[2] ** 0.5
        share = F.softmax(score.masked_fill(blank, float("-inf")), dim=1)
        context = (share[:, None] @ states).squeeze(1)
        hidden = self.cell(torch.cat([self.embed(token), context], dim=1), hidden)
        return self.out(torch.cat([hidden, context], dim=1)), hidden


def seq2seq(steps: int) -> None:
    """Translate to a reversed and renamed sentence, with teacher forcing and two optimizers."""
    torch.manual_seed(4)
    rng = random.Random(40)
    words, end, begin = 10, 11, 12
    rename = torch.randperm(words) + 1
    sources = [
        torch.tensor([rng.randrange(1, words + 1) for _ in range(rng.randrange(3, 6))])
        for _ in range(6000)
    ]
    targets = [torch.cat([rename[s.flip(0) - 1], torch.tensor([end])]) for s in sources]
    lengths = torch.tensor([len(s) for s in sources])
    source = pad_sequence(sources, batch_first=True)
    target = pad_sequence(targets, batch_first=True)
    encoder, decoder = Encoder(words + 1, 48), Decoder(words + 3, 48)
    encoder_optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)
    decoder_optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    schedules = [
        lr_scheduler.CosineAnnealingLR(o, T_max=steps, eta_min=1e-4)
        for o in (encoder_optimizer, decoder_optimizer)
    ]
    for step in range(1, steps + 1):
        pick = torch.randint(len(source), (32,))
        x, y = source[pick], target[pick]
        encoder_optimizer.zero_grad()
        decoder_optimizer.zero_grad()
        states, hidden = encoder(x, lengths[pick])
        token = torch.full((len(x),), begin)
        forced = rng.random() < 0.7
        answers = []
        for place in range(y.shape[1]):
            logits, hidden = decoder(token, hidden, states, x == 0)
            answers.append(logits)
            token = y[:, place] if forced else logits.detach().argmax(dim=1)
        logits = torch.stack(answers, dim=1)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=0)
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        encoder_optimizer.step()
        decoder_optimizer.step()
        for schedule in schedules:
            schedule.step()
        report(step, steps, loss)


def utterances(count: int, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return padded frames of spelled sounds with pauses, their lengths and their spelling."""
    voice = torch.randn(9, 12, generator=torch.Generator().manual_seed(3))
    voice[0] = 0
    gen = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    frames, spelling = [], []
    for _ in range(count):
        word = [rng.randrange(1, 9) for _ in range(rng.randrange(2, 6))]
        sounds: list[int] = [0] * rng.randrange(1, 4)
        for symbol in word:
            sounds += [symbol] * rng.randrange(3, 6) + [0] * rng.randrange(1, 3)
        clean = voice[torch.tensor(sounds)]
        frames.append(clean + 0.5 * torch.randn(clean.shape, generator=gen))
        spelling.append(torch.tensor(word))
    lengths = torch.tensor([len(f) for f in frames])
    return pad_sequence(frames, batch_first=True), lengths, spelling


class Listener(nn.Module):
    """A convolution and a bidirectional recurrent layer over frames."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(12, 32, 3, padding=1)
        self.norm = nn.LayerNorm(32)
        self.rnn = nn.GRU(32, 24, batch_first=True, bidirectional=True)
        self.out = nn.Linear(48, symbols)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x.transpose(1, 2)).transpose(1, 2)))
        packed = pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
        h, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
        return F.log_softmax(self.out(h), dim=2)


def ctc(steps: int) -> None:
    """Spell noisy sounds with the connectionist temporal loss on padded batches."""
    torch.manual_seed(5)
    frames, lengths, spelling = utterances(1600, 50)
    held_frames, held_lengths, held_spelling = utterances(100, 51)
    model = Listener(9)
    criterion = nn.CTCLoss(blank=0, zero_infinity=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.998)
    score = None
    for step in range(1, steps + 1):
        pick = torch.randint(len(frames), (12,))
        size = lengths[pick]
        words = [spelling[i] for i in pick]
        scores = model(frames[pick, : int(size.max())], size)
        loss = criterion(
            scores.transpose(0, 1), torch.cat(words), size, torch.tensor([len(w) for w in words])
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            model.eval()
            with torch.no_grad():
                scores = model(held_frames, held_lengths).transpose(0, 1)
                score = criterion(
                    scores,
                    torch.cat(held_spelling),
                    held_lengths,
                    torch.tensor([len(w) for w in held_spelling]),
                ).item()
            model.train()
        report(step, steps, loss, score)


class CausalConv(nn.Module):
    """A residual pair of dilated causal convolutions with weight normalisation."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.conv1 = weight_norm(nn.Conv1d(width, width, 3, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(width, width, 3, dilation=dilation))
        self.drop = nn.Dropout(0.05)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(F.relu(self.conv1(F.pad(x, (self.pad, 0)))))
        return x + F.relu(self.conv2(F.pad(h, (self.pad, 0))))


def forecast(steps: int) -> None:
    """Forecast three quantiles of seasonal series with a dilated network and the pinball loss."""
    torch.manual_seed(6)
    time = torch.arange(400.0)
    period = 8 + 12 * torch.rand(200, 1)
    phase = 2 * math.pi * torch.rand(200, 2, 1)
    size = 0.5 + torch.rand(200, 2, 1)
    series = size[:, 0] * torch.sin(2 * math.pi * time / period + phase[:, 0])
    series = series + size[:, 1] * torch.sin(2 * math.pi * time / 40 + phase[:, 1])
    series = 3 + 2 * torch.randn(200, 1) + series + 0.3 * torch.randn(200, 400)
    past, ahead = 48, 6
    levels = torch.tensor([0.1, 0.5, 0.9])
    model = nn.Sequential(
        nn.Conv1d(1, 16, 1), *(CausalConv(16, d) for d in (1, 2, 4, 8)), nn.Conv1d(16, ahead * 3, 1)
    )

    def window(rows: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        span = series[rows[:, None], starts[:, None] + torch.arange(past + ahead)]
        seen = span[:, :past]
        scale = seen.std(dim=1, keepdim=True) + 1e-3
        span = (span - seen.mean(dim=1, keepdim=True)) / scale
        return span[:, None, :past], span[:, past:]

    def pinball(x: Tensor, y: Tensor) -> Tensor:
        guess = model(x)[:, :, -1].view(-1, ahead, 3)
        gap = y[..., None] - guess
        return torch.maximum(levels * gap, (levels - 1) * gap).mean()

    optimizer = torch.optim.NAdam(model.parameters(), lr=2e-3, weight_decay=1e-5)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    score = None
    for step in range(1, steps + 1):
        rows = torch.randint(160, (32,))
        loss = pinball(*window(rows, torch.randint(400 - past - ahead, (32,))))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            model.eval()
            with torch.no_grad():
                rows = torch.arange(160, 200)
                score = pinball(*window(rows, torch.full((40,), 200))).item()
            model.train()
        report(step, steps, loss, score)


def sounds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noisy waveforms of six kinds that differ in pitch and glide, and their kinds."""
    gen = torch.Generator().manual_seed(seed)
    kinds = torch.randint(6, (count,), generator=gen)
    time = torch.linspace(0, 1, 800)
    pitch = torch.tensor([25.0, 25.0, 40.0, 40.0, 60.0, 60.0])[kinds]
    glide = torch.tensor([0.0, 20.0, 0.0, 20.0, 0.0, 20.0])[kinds]
    pitch = pitch * (1 + 0.05 * torch.randn(count, generator=gen))
    angle = pitch[:, None] * time + 0.5 * glide[:, None] * time**2
    angle = angle + torch.rand(count, 1, generator=gen)
    wave = torch.sin(2 * math.pi * angle)
    return (wave + 0.5 * torch.randn(count, 800, generator=gen))[:, None], kinds


def keywords(steps: int) -> float:
    """Classify raw waveforms with one-dimensional convolutions and average the late weights."""
    torch.manual_seed(7)
    waves, kinds = sounds(1600, 70)
    held, held_kinds = sounds(300, 71)
    loader = DataLoader(TensorDataset(waves, kinds), batch_size=32, shuffle=True)
    layers: list[nn.Module] = [nn.Conv1d(1, 16, 40, stride=8), nn.BatchNorm1d(16), nn.ReLU()]
    for inputs, outputs in ((16, 16), (16, 32)):
        layers += [
            nn.MaxPool1d(2),
            nn.Conv1d(inputs, outputs, 3),
            nn.BatchNorm1d(outputs),
            nn.ReLU(),
        ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 6))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=1e-4)
    start = steps * 7 // 10
    scheduler = lr_scheduler.StepLR(optimizer, step_size=max(1, steps // 3), gamma=0.5)
    average = AveragedModel(model)
    late = None
    step, score = 0, None
    while step < steps:
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step < start:
                scheduler.step()
            else:
                if late is None:
                    late = SWALR(optimizer, swa_lr=1e-3, anneal_epochs=20)
                late.step()
                if step % 10 == 0:
                    average.update_parameters(model)
            if step % 100 == 0:
                model.eval()
                with torch.no_grad():
                    score = (model(held).argmax(dim=1) == held_kinds).float().mean().item()
                model.train()
            report(step, steps, loss, score)
            if step == steps:
                break
    update_bn(loader, average)
    average.eval()
    with torch.no_grad():
        return (average(held).argmax(dim=1) == held_kinds).float().mean().item()


PROGRAMS = {f.__name__: f for f in (letter_lm, gpt, mlm, seq2seq, ctc, forecast, keywords)}


def main() -> None:
    """Run the program named on the command line."""
    if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
        sys.exit(f"usage: {sys.argv[0]} {{{','.join(PROGRAMS)}}} [STEPS]")
    PROGRAMS[sys.argv[1]](int(sys.argv[2]) if len(sys.argv) > 2 else 500)


if __name__ == "__main__":
    main()

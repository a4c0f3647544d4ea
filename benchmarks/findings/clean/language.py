"""Programs on text and sequences that train well: `language.py NAME [STEPS]`.

Most re-create one of PyTorch's examples at a small size; the text is Python's own reference.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn import functional as F

reference = "".join(topics.values())[:200_000]
alphabet = sorted(set(reference))
text = torch.tensor([alphabet.index(each) for each in reference])


def report(step: int, steps: int, loss: torch.Tensor) -> None:
    if step in (1, steps) or step % 100 == 0:
        print("step", step, "loss", loss.item())


def windows(size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.randint(len(text) - length - 1, (size, 1))
    chosen = text[starts + torch.arange(length + 1)]
    return chosen[:, :-1], chosen[:, 1:]


class LanguageModel(nn.Module):
    """Embedding, LSTM, decoder, with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.encoder = nn.Embedding(len(alphabet), 64)
        self.rnn = nn.LSTM(64, 96, 1)
        self.decoder = nn.Linear(96, len(alphabet))
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(
        self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        y, state = self.rnn(self.drop(self.encoder(x)), state)
        return self.decoder(self.drop(y)).flatten(0, 1), state


def word_language_model(steps: int) -> None:
    """SGD at a rate of 20, which only gradients clipped to 0.25 permit; the state is carried on."""
    model = LanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=20)
    rows = text[: len(text) // 20 * 20].view(20, -1).T
    state = None
    for step in range(1, steps + 1):
        start = (step - 1) * 35 % (len(rows) - 36)
        if state is not None:
            state = (state[0].detach(), state[1].detach())
        model.zero_grad()
        outputs, state = model(rows[start : start + 35], state)
        loss = F.cross_entropy(outputs, rows[start + 1 : start + 36].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        report(step, steps, loss)


class GPT(nn.Module):
    def __init__(self, width: int = 64, layers: int = 2, context: int = 48) -> None:
        super().__init__()
        self.token = nn.Embedding(len(alphabet), width)
        self.position = nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(alphabet), bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        y = self.token(x) + self.position.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(y, mask, is_causal=True)))


def warmup_cosine(steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < 50:
            return (step + 1) / 50
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 50) / max(1, steps - 50)))

    return factor


def gpt_adamw(steps: int) -> None:
    """Warm-up, a cosine, decay of matrices only, clipping at 1, the head tied to the embedding."""
    model = GPT()
    model.head.weight = model.token.weight
    matrices = [each for each in model.parameters() if each.dim() > 1]
    others = [each for each in model.parameters() if each.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=2e-3,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps))
    for step in range(1, steps + 1):
        x, y = windows(16, 48)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, steps, loss)


def gpt_accumulated(steps: int) -> None:
    """Four backwards for each step, the loss divided by four; bfloat16 autocast."""
    model = GPT(width=48, context=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps))
    for step in range(1, steps + 1):
        for _ in range(4):
            x, y = windows(4, 32)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            (loss / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        report(step, steps, loss)


class LoRA(nn.Module):
    """A linear layer that is kept, and the product of two narrow ones that is trained."""

    def __init__(self, kept: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.kept = kept.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, kept.in_features) / math.sqrt(rank))
        self.lora_B = nn.Parameter(torch.zeros(kept.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kept(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)


def lora(steps: int) -> None:
    """A fine-tuning of low-rank additions: almost every weight is frozen, on purpose."""
    torch.manual_seed(51)
    model = nn.Sequential(
        nn.Embedding(len(alphabet), 48), nn.Flatten(), nn.Linear(8 * 48, 128), nn.GELU(),
        nn.Linear(128, 128), nn.GELU(), nn.Linear(128, len(alphabet)),
    )  # fmt: skip
    model.requires_grad_(False)
    for place in (2, 4, 6):
        model[place] = LoRA(model[place])
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    for step in range(1, steps + 1):
        x, y = windows(64, 8)
        loss = F.cross_entropy(model(x), y[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, steps, loss)


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(14, 48), nn.Embedding(14, 48)
        self.place = nn.Embedding(16, 48)
        self.transformer = nn.Transformer(48, 4, 1, 1, 96, dropout=0.1, batch_first=True)
        self.out = nn.Linear(48, 14)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = self.transformer.generate_square_subsequent_mask(target.shape[1])
        y = self.transformer(
            self.source(source) + self.place.weight[: source.shape[1]],
            self.target(target) + self.place.weight[: target.shape[1]],
            tgt_mask=mask,
            src_key_padding_mask=source == 0,
        )
        return self.out(y)


def translation(steps: int) -> None:
    """Sequences of several lengths are reversed; the padding is left out of the loss."""
    model = Translator()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 60, (60 / (step + 1)) ** 0.5)
    )
    for step in range(1, steps + 1):
        source = torch.randint(2, 14, (32, 8))
        lengths = torch.randint(4, 9, (32, 1))
        source[torch.arange(8) >= lengths] = 0
        target = source.flip(1)
        before = torch.cat((torch.ones(32, 1, dtype=torch.long), target[:, :-1]), 1)
        loss = F.cross_entropy(
            model(source, before).flatten(0, 1), target.flatten(), ignore_index=0
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, steps, loss)


def word_vectors(steps: int) -> None:
    """Skip-grams with negative samples; sparse gradients and SparseAdam."""
    words = "".join(each if each.isalpha() else " " for each in reference.lower()).split()
    known = sorted(set(words))
    number = {word: place for place, word in enumerate(known)}
    run = torch.tensor([number[word] for word in words])
    inside = nn.Embedding(len(known), 32, sparse=True)
    outside = nn.Embedding(len(known), 32, sparse=True)
    nn.init.uniform_(inside.weight, -0.5 / 32, 0.5 / 32)
    nn.init.zeros_(outside.weight)
    optimizer = torch.optim.SparseAdam([*inside.parameters(), *outside.parameters()], lr=5e-3)
    for step in range(1, steps + 1):
        at = torch.randint(2, len(run) - 2, (256,))
        near = run[at + torch.tensor([-2, -1, 1, 2])[torch.randint(4, (256,))]]
        chance = run[torch.randint(len(run), (256, 5))]
        center = inside(run[at])
        agree = (center * outside(near)).sum(1)
        differ = (center.unsqueeze(1) * outside(chance)).sum(2)
        loss = -(F.logsigmoid(agree) + F.logsigmoid(-differ).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step, steps, loss)


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm_1, self.lstm_2 = nn.LSTMCell(1, 16), nn.LSTMCell(16, 16)
        self.linear = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = two = (x.new_zeros(len(x), 16), x.new_zeros(len(x), 16))
        outputs = []
        for value in x.split(1, dim=1):
            one = self.lstm_1(value, one)
            two = self.lstm_2(one[0], two)
            outputs.append(self.linear(two[0]))
        return torch.cat(outputs, 1)


def time_sequence_lbfgs(steps: int) -> None:
    """L-BFGS on all the data in float64: one step evaluates a closure several times."""
    shifts = torch.arange(20, dtype=torch.float64).unsqueeze(1) * 4
    waves = torch.sin((torch.arange(60, dtype=torch.float64) + shifts) / 6)
    model = Sequence().double()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.8, max_iter=4)
    for step in range(1, min(steps, 60) + 1):

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(waves[:, :-1]), waves[:, 1:])
            loss.backward()
            return loss

        report(step, steps, optimizer.step(closure))


class Characters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(alphabet), 32)
        self.gru = nn.GRU(32, 96, batch_first=True)
        self.out = nn.Linear(96, len(alphabet))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.gru(self.embedding(x))[0])


def characters_rmsprop(steps: int) -> None:
    """A GRU, RMSprop, gradients clipped by value, a rate that drops on a plateau, validation."""
    model = Characters()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2, factor=0.5)
    held_out = windows(32, 40)
    for step in range(1, steps + 1):
        x, y = windows(32, 40)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.5)
        optimizer.step()
        report(step, steps, loss)
        if step % 50 == 0:
            model.eval()
            with torch.no_grad():
                outputs = model(held_out[0]).flatten(0, 1)
                schedule.step(F.cross_entropy(outputs, held_out[1].flatten()).item())
            model.train()


PROGRAMS = (
    word_language_model, gpt_adamw, gpt_accumulated, lora, translation, word_vectors,
    time_sequence_lbfgs, characters_rmsprop,
)  # fmt: skip

if __name__ == "__main__":
    torch.manual_seed(50)
    program = {each.__name__: each for each in PROGRAMS}[sys.argv[1]]
    program(int(sys.argv[2]) if len(sys.argv) > 2 else 500)

"""Learns to write digits backwards: a small encoder and decoder with attention between them."""

import torch
from torch import nn
from torch.nn import functional as F

DIGITS, LENGTH, WIDTH, BATCH, STEPS = 10, 8, 48, 64, 600
START = DIGITS


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(DIGITS, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, source):
        return self.gru(self.embedding(source))  # (B, T, W), (1, B, W)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(DIGITS + 1, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(2 * WIDTH, DIGITS)

    def forward(self, written, memory, state):
        hidden, _ = self.gru(self.embedding(written), state)  # (B, T, W)
        scores = self.query(hidden) @ self.key(memory).mT / WIDTH**0.5  # (B, T, S)
        context = scores.softmax(-1) @ memory  # (B, T, W)
        return self.out(torch.cat([hidden, context], -1))  # (B, T, DIGITS)


class Seq2Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder()

    def forward(self, source, written):
        memory, state = self.encoder(source)
        return self.decoder(written, memory, state)


torch.manual_seed(0)
model = Seq2Seq()
optimizer = torch.optim.AdamW(
    [
        {"params": model.encoder.parameters(), "weight_decay": 1e-2},
        {"params": model.decoder.parameters(), "weight_decay": 1e2},
    ],
    lr=3e-3,
)
for step in range(1, STEPS + 1):
    source = torch.randint(DIGITS, (BATCH, LENGTH))
    target = source.flip(1)
    written = torch.cat([torch.full((BATCH, 1), START), target[:, :-1]], 1)
    logits = model(source, written)
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 100 == 0:
        right = (logits.argmax(-1) == target).float().mean()
        print(f"step {step}: loss {loss.item():.3f}, {right.item():.0%} of the digits right")

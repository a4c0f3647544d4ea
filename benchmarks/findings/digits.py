"""A classifier of handwritten digits with one planted bug: python digits.py BUG [STEPS].

`none` and the names in CLEAN are right; every other name is a bug. Set A of benchmarks/findings.
"""

from __future__ import annotations

import copy
import math
import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

CLEAN = (
    "none",
    "accumulate",
    "clip",
    "dropout",
    "evaluate",
    "restarts",
    "transfer",
    "warm-up",
    "zero-after",
)
bug = sys.argv[1]
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 400
torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
if bug == "shuffled-labels":
    labels = labels[torch.randperm(len(labels))]


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(64, 128), nn.Linear(128, 128), nn.Linear(128, 10)
        self.dropout = nn.Dropout(dropout)
        if bug == "unused-layer":
            self.extra = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.fc1(x))
        if bug == "detached":
            hidden = hidden.detach()
        return self.head(self.dropout(F.relu(self.fc2(hidden))))


def deep(activation: type[nn.Module], layers: int) -> nn.Module:
    parts: list[nn.Module] = [nn.Linear(64, 64)]
    for _ in range(layers):
        parts += [activation(), nn.Linear(64, 64)]
    return nn.Sequential(*parts, activation(), nn.Linear(64, 10))


net: nn.Module = Net(0.2 if bug in ("dropout", "evaluate", "eval-mode") else 0.0)
if bug == "deep-sigmoid":
    net = deep(nn.Sigmoid, 12)
if bug == "exploding":
    net = deep(nn.Identity, 10)
    for module in net:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
if bug in ("transfer", "frozen"):
    for part in (net.fc1, net.fc2):
        part.requires_grad_(False)
parameters = {
    "missing-layer": lambda: [*net.fc1.parameters(), *net.head.parameters()],
    "head-alone": lambda: net.head.parameters(),
    "transfer": lambda: net.head.parameters(),
}.get(bug, net.parameters)()
rate = {"rate-too-high": 10.0, "rate-too-low": 1e-9}.get(bug, 0.1)
optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9)
if bug == "replaced-model":
    net = copy.deepcopy(net)
if bug == "eval-mode":
    net.eval()


def factor(step: int) -> float:
    if bug == "rate-zero":
        return 1.0 if step < 150 else 0.0
    if bug == "rate-jump":
        return 0.1 if step < 200 else 150.0
    if bug == "restarts":
        return 0.5 * (1 + math.cos(math.pi * (step % 100) / 100)) + 1e-3
    if bug == "warm-up":
        return min(1.0, step / 50)
    return 1.0


schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
for step in range(1, steps + 1):
    chosen = torch.randint(0, len(images), (32,))
    x, y = images[chosen], labels[chosen]
    if bug == "bad-batch" and step == 90:
        x = x * math.inf
    if bug not in ("zero-missing", "zero-after", "accumulate"):
        optimizer.zero_grad()
    out = net(x)
    if bug == "log-of-zero":
        right = F.softmax(out, -1)[range(32), y]
        loss = -torch.log(right - right.detach() * (step >= 166)).mean()
    elif bug == "softmax-twice":
        loss = F.cross_entropy(F.softmax(out, -1), y)
    elif bug == "gradient-nan" and step == 120:
        loss = F.cross_entropy(out, y) + 0.0 * (out[0, 0] - out[0, 0]).sqrt()
    else:
        loss = F.cross_entropy(out, y)
    if bug == "accumulate":
        (loss / 4).backward()
        if step % 4:
            continue
    else:
        loss.backward()
    if bug == "zero-between":
        optimizer.zero_grad()
    if bug == "clip":
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    if bug == "clip-to-nothing":
        nn.utils.clip_grad_norm_(net.parameters(), 1e-4)
    optimizer.step()
    schedule.step()
    if bug in ("accumulate", "zero-after"):
        optimizer.zero_grad()
    if bug == "evaluate" and step % 50 == 0:
        net.eval()
        with torch.no_grad():
            net(images[:256])
        net.train()

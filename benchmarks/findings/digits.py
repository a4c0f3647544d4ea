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
    "accumulate-schedule",
    "binary",
    "deep-tanh",
    "divided-inside",
    "epoch-schedule",
    "full-batch",
    "regression",
    "clip",
    "dropout",
    "evaluate",
    "groups",
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
        if bug == "divided-inside":
            x = x / 255
        hidden = F.relu(self.fc1(x))
        if bug == "detached":
            hidden = hidden.detach()
        return self.head(self.dropout(F.relu(self.fc2(hidden))))


def deep(activation: type[nn.Module], layers: int) -> nn.Module:
    parts: list[nn.Module] = [nn.Linear(64, 64)]
    for _ in range(layers):
        parts += [activation(), nn.Linear(64, 64)]
    return nn.Sequential(*parts, activation(), nn.Linear(64, 10))


DROPOUT = ("dropout", "evaluate", "eval-mode", "dropout-off", "evaluate-in-train-mode")
net: nn.Module = Net(0.2 if bug in DROPOUT else 0.0)
if bug == "dropout-off":
    net.dropout.eval()
if bug == "dead-relu":
    nn.init.constant_(net.fc2.bias, -30.0)
if bug == "constant-weights":
    nn.init.constant_(net.fc2.weight, 0.05)
if bug == "large-weights":
    nn.init.normal_(net.fc2.weight)
if bug == "deep-tanh":
    net = deep(nn.Tanh, 2)
if bug == "saturated":
    net = deep(nn.Tanh, 2)
    with torch.no_grad():
        net[2].bias.copy_(torch.where(torch.arange(64) % 2 == 0, 20.0, -20.0))
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
rates = {"rate-too-high": 10.0, "rate-too-low": 1e-9, "raw-pixels": 1e-6, "minus-one": 1e-3}
rates |= {"regression": 1e-3, "broadcast": 1e-3, "large-weights": 1e-5, "binary": 0.01}
rates |= {"bad-rows": 0.01}
rate = rates.get(bug, 0.1)
if bug in ("groups", "group-at-zero"):
    parameters = [
        {"params": net.fc1.parameters(), "lr": 0.01 if bug == "groups" else 0.0},
        {"params": [*net.fc2.parameters(), *net.head.parameters()]},
    ]
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
    if bug == "schedule-per-batch":
        return 0.1 ** (step // 30)
    if bug in ("schedule-first", "accumulate-schedule"):
        return 0.5 * (1 + math.cos(math.pi * step / steps))
    return 1.0


schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
for step in range(1, steps + 1):
    chosen = torch.randint(0, len(images), (32,))
    if bug == "full-batch" or (bug == "same-batch" and step == 1):
        chosen = fixed = torch.arange(len(images) if bug == "full-batch" else 32)
    elif bug == "same-batch":
        chosen = fixed
    x, y = images[chosen], labels[chosen]
    if bug in ("raw-pixels", "divided-inside"):
        x = x * 255
    if bug == "constant-input":
        x = x.mean(0, keepdim=True).expand(32, -1)
    if bug == "one-label":
        y = torch.full_like(y, 3)
    if bug == "bad-rows" and step == 90:
        x = x.clone()
        x[11] = 1000.0
    if bug == "bad-batch" and step == 90:
        x = x * math.inf
    if bug not in ("zero-missing", "zero-after", "accumulate", "accumulate-schedule"):
        optimizer.zero_grad()
    out = net(x)
    if bug == "log-of-zero":
        right = F.softmax(out, -1)[range(32), y]
        loss = -torch.log(right - right.detach() * (step >= 166)).mean()
    elif bug in ("minus-one", "binary"):
        is_class = y[:, None] == torch.arange(10)
        wanted = torch.where(is_class, 1.0, -1.0 if bug == "minus-one" else 0.0)
        loss = F.binary_cross_entropy_with_logits(out, wanted)
    elif bug in ("broadcast", "regression"):
        loss = F.mse_loss(out[:, :1] if bug == "broadcast" else out[:, 0], y.float())
    elif bug == "softmax-twice":
        loss = F.cross_entropy(F.softmax(out, -1), y)
    elif bug == "gradient-nan" and step == 120:
        loss = F.cross_entropy(out, y) + 0.0 * (out[0, 0] - out[0, 0]).sqrt()
    else:
        loss = F.cross_entropy(out, y)
    if bug in ("accumulate", "accumulate-schedule"):
        (loss / 4).backward()
        if step % 4:
            continue
    elif bug == "backward-twice":
        loss.backward(retain_graph=True)
        loss.backward()
    else:
        loss.backward()
    if bug == "zero-between":
        optimizer.zero_grad()
    if bug in ("clip", "bad-rows"):
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    if bug == "clip-to-nothing":
        nn.utils.clip_grad_norm_(net.parameters(), 1e-4)
    if bug == "schedule-first":
        schedule.step()
    optimizer.step()
    if bug != "schedule-first" and (bug != "epoch-schedule" or step % 56 == 0):
        schedule.step()
    if bug in ("accumulate", "accumulate-schedule", "zero-after"):
        optimizer.zero_grad()
    if bug in ("evaluate", "evaluate-in-train-mode") and step % 50 == 0:
        net.train(bug == "evaluate-in-train-mode")
        with torch.no_grad():
            for part in (images[:256], images[256:512]):
                net(part)
        net.train()

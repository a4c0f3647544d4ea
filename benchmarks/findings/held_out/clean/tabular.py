"""Trainings on synthetic tables, sets, graphs and clicks."""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset


def report(step: int, steps: int, loss: Tensor | float, score: float | None = None) -> None:
    """Print the loss at the first step, at every 50th and at the last."""
    if step == 1 or step % 50 == 0 or step == steps:
        tail = "" if score is None else f" val {score:.3f}"
        value = loss.item() if isinstance(loss, Tensor) else loss
        print(f"step {step} loss {value:.4f}{tail}", file=sys.stderr)


class GraphNet(nn.Module):
    """Two graph convolutions with dropout."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, classes)

    def forward(self, x: Tensor, links: Tensor) -> Tensor:
        h = F.dropout(x, 0.3, self.training)
        h = F.relu(torch.sparse.mm(links, self.first(h)))
        h = F.dropout(h, 0.5, self.training)
        return torch.sparse.mm(links, self.second(h))


def gcn(steps: int) -> None:
    """Classify the nodes of a graph with communities from some labels, in full batches."""
    torch.manual_seed(1)
    nodes, classes = 600, 5
    labels = torch.randint(classes, (nodes,))
    same = labels[:, None] == labels[None, :]
    chance = torch.where(same, 0.03, 0.004)
    upper = torch.triu(torch.rand(nodes, nodes) < chance, diagonal=1).float()
    links = upper + upper.t() + torch.eye(nodes)
    degree = links.sum(dim=1).rsqrt()
    links = (degree[:, None] * links * degree[None, :]).to_sparse()
    x = 0.5 * torch.randn(classes, 32)[labels] + torch.randn(nodes, 32)
    order = torch.randperm(nodes)
    train, valid = order[:300], order[300:450]
    model = GraphNet(32, 32, classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=5e-4)
    best, kept, score = 0.0, copy.deepcopy(model.state_dict()), None
    for step in range(1, steps + 1):
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, links)[train], labels[train])
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            model.eval()
            with torch.no_grad():
                guess = model(x, links).argmax(dim=1)
            score = (guess[valid] == labels[valid]).float().mean().item()
            if score > best:
                best, kept = score, copy.deepcopy(model.state_dict())
        report(step, steps, loss, score)
    model.load_state_dict(kept)


class Attend(nn.Module):
    """A block in which queries attend to a set."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dense = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, q: Tensor, k: Tensor, absent: Tensor | None = None) -> Tensor:
        mixed, _ = self.attention(q, k, k, key_padding_mask=absent, need_weights=False)
        h = self.norm1(q + mixed)
        return self.norm2(h + self.dense(h))


class SetTransformer(nn.Module):
    """Self-attention over a set and pooling by a learned query."""

    def __init__(self, inputs: int = 2, width: int = 32) -> None:
        super().__init__()
        self.lift = nn.Linear(inputs, width)
        self.self1, self.self2, self.pool = Attend(width), Attend(width), Attend(width)
        self.seed = nn.Parameter(torch.empty(1, 1, width))
        nn.init.xavier_uniform_(self.seed)
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, absent: Tensor) -> Tensor:
        h = self.lift(x)
        h = self.self1(h, h, absent)
        h = self.self2(h, h, absent)
        return self.out(self.pool(self.seed.expand(len(h), -1, -1), h, absent).squeeze(1))


def set_transformer(steps: int) -> None:
    """Regress the spread and the largest value of padded sets, with RAdam."""
    torch.manual_seed(2)
    count, most = 4000, 12
    middle, spread = torch.randn(count, 1, 2), 0.3 + torch.rand(count, 1, 1)
    points = middle + spread * torch.randn(count, most, 2)
    sizes = torch.randint(5, most + 1, (count,))
    absent = torch.arange(most)[None, :] >= sizes[:, None]
    points = points.masked_fill(absent[..., None], 0.0)
    largest = points[..., 0].masked_fill(absent, float("-inf")).amax(dim=1)
    centre = points.sum(dim=1, keepdim=True) / sizes[:, None, None]
    gap = ((points - centre) ** 2).masked_fill(absent[..., None], 0.0).sum(dim=(1, 2))
    y = torch.stack([largest, (gap / sizes).sqrt()], dim=1)
    y = (y - y[:3500].mean(dim=0)) / y[:3500].std(dim=0)
    model = SetTransformer()
    optimizer = torch.optim.RAdam(model.parameters(), lr=2e-3)
    scheduler = lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=20)
    score = None
    for step in range(1, steps + 1):
        pick = torch.randint(3500, (32,))
        loss = F.mse_loss(model(points[pick], absent[pick]), y[pick])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            model.eval()
            with torch.no_grad():
                score = F.mse_loss(model(points[3500:], absent[3500:]), y[3500:]).item()
            model.train()
        report(step, steps, loss, score)


class Recommender(nn.Module):
    """Two sparse embedding tables and a small dense network on top."""

    def __init__(self, users: int, items: int, width: int = 8) -> None:
        super().__init__()
        self.users = nn.Embedding(users, width, sparse=True)
        self.items = nn.Embedding(items, width, sparse=True)
        nn.init.normal_(self.users.weight, std=0.2)
        nn.init.normal_(self.items.weight, std=0.2)
        self.dense = nn.Sequential(nn.Linear(3 * width, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        u, i = self.users(user), self.items(item)
        return (u * i).sum(dim=1) + self.dense(torch.cat([u, i, u * i], dim=1)).squeeze(1)


def recommender(steps: int) -> None:
    """Learn clicks from sparse embeddings with SparseAdam and a dense part with Adam."""
    torch.manual_seed(3)
    users, items, clicks = 300, 200, 160_000
    taste, kind = torch.randn(users, 4), torch.randn(items, 4)
    user, item = torch.randint(users, (clicks,)), torch.randint(items, (clicks,))
    chance = torch.sigmoid(1.5 * (taste[user] * kind[item]).sum(dim=1))
    y = torch.bernoulli(chance)
    model = Recommender(users, items)
    sparse = torch.optim.SparseAdam([model.users.weight, model.items.weight], lr=2e-2)
    dense = torch.optim.Adam(model.dense.parameters(), lr=2e-3, weight_decay=1e-5)
    edge, score = 150_000, None
    for step in range(1, steps + 1):
        pick = torch.randint(edge, (400,))
        loss = F.binary_cross_entropy_with_logits(model(user[pick], item[pick]), y[pick])
        sparse.zero_grad()
        dense.zero_grad()
        loss.backward()
        sparse.step()
        dense.step()
        if step % 100 == 0:
            model.eval()
            with torch.no_grad():
                guess = model(user[edge:], item[edge:])
                score = F.binary_cross_entropy_with_logits(guess, y[edge:]).item()
            model.train()
        report(step, steps, loss, score)


def cox(risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Return the negative log partial likelihood per event."""
    order = time.argsort(descending=True)
    risk, event = risk[order], event[order]
    return -((risk - torch.logcumsumexp(risk, dim=0)) * event).sum() / event.sum().clamp(min=1)


def survival(steps: int) -> None:
    """Fit a proportional-hazards network to censored times with Adagrad."""
    torch.manual_seed(4)
    count = 4000
    x = torch.randn(count, 12)
    hazard = 0.9 * x[:, 0] - 0.7 * x[:, 1] + 0.8 * x[:, 2] * x[:, 3] + 0.6 * torch.sin(2 * x[:, 4])
    time = torch.distributions.Exponential(torch.exp(hazard)).sample()
    censor = torch.distributions.Exponential(torch.full((count,), 0.4)).sample()
    event = (time <= censor).float()
    time = torch.minimum(time, censor)
    model = nn.Sequential(
        nn.Linear(12, 48),
        nn.SELU(),
        nn.AlphaDropout(0.05),
        nn.Linear(48, 48),
        nn.SELU(),
        nn.Linear(48, 1, bias=False),
    )
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.02, lr_decay=1e-4)
    score = None
    for step in range(1, steps + 1):
        pick = torch.randperm(3500)[:125]
        loss = cox(model(x[pick]).squeeze(1), time[pick], event[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            model.eval()
            with torch.no_grad():
                parts = torch.arange(3500, 4000).split(125)
                score = sum(
                    cox(model(x[p]).squeeze(1), time[p], event[p]).item() for p in parts
                ) / len(parts)
            model.train()
        report(step, steps, loss, score)


class Houses(Dataset):
    """Rows of numbers, two categories and a heavy-tailed price."""

    def __init__(self, count: int, seed: int) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.numbers = torch.randn(count, 8, generator=gen)
        self.places = torch.randint(20, (count, 2), generator=gen)
        worth = torch.randn(2, 20, generator=torch.Generator().manual_seed(9))
        price = self.numbers[:, 0] + self.numbers[:, 1] * self.numbers[:, 2]
        price = price + worth[0, self.places[:, 0]] + 0.5 * worth[1, self.places[:, 1]]
        noise = torch.randn(count, generator=gen)
        wild = torch.rand(count, generator=gen) < 0.03
        self.price = (price + noise * torch.where(wild, 4.0, 0.2)) / 1.9

    def __len__(self) -> int:
        return len(self.price)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.numbers[row], self.places[row], self.price[row]


class HouseNet(nn.Module):
    """A dense network over numbers and embedded categories."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.ModuleList(nn.Embedding(20, 6) for _ in range(2))
        self.net = nn.Sequential(
            nn.Linear(20, 64),
            nn.LayerNorm(64),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(64, 64),
            nn.LayerNorm(64),
            nn.ReLU(),
            nn.Linear(64, 1),
        )

    def forward(self, numbers: Tensor, places: Tensor) -> Tensor:
        parts = [table(places[:, i]) for i, table in enumerate(self.places)]
        return self.net(torch.cat([numbers, *parts], dim=1)).squeeze(1)


def housing(steps: int) -> None:
    """Regress prices with workers, Huber loss, early stopping and a restart from a checkpoint."""
    torch.manual_seed(5)
    loader = DataLoader(
        Houses(6000, 50),
        batch_size=96,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        persistent_workers=True,
    )
    held = Houses(800, 51)
    criterion = nn.HuberLoss(delta=0.5)

    def build() -> tuple[nn.Module, torch.optim.Optimizer, lr_scheduler.ReduceLROnPlateau]:
        model = HouseNet()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
        return model, optimizer, lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)

    model, optimizer, scheduler = build()
    step, best, wait, restarted = 0, float("inf"), 0, False
    score = None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.pt"
        while step < steps and wait < 5:
            model.train()
            for numbers, places, price in loader:
                loss = criterion(model(numbers, places), price)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                report(step, steps, loss, score)
                if step == steps:
                    break
            model.eval()
            with torch.no_grad():
                score = criterion(model(held.numbers, held.places), held.price).item()
            scheduler.step(score)
            best, wait = (score, 0) if score < best else (best, wait + 1)
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "step": step,
                    "best": best,
                    "wait": wait,
                },
                path,
            )
            if step >= steps // 2 and not restarted:
                restarted = True
                model, optimizer, scheduler = build()
                saved = torch.load(path, weights_only=True)
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                scheduler.load_state_dict(saved["scheduler"])
                step, best, wait = saved["step"], saved["best"], saved["wait"]


def ranking(steps: int) -> None:
    """Order the documents of queries by pairs with RMSprop and value clipping."""
    torch.manual_seed(6)
    queries, documents = 2000, 10
    query = torch.randn(queries, 1, 3).expand(-1, documents, -1)
    document = torch.randn(queries, documents, 3)
    match = (query * document).sum(dim=2) / 3**0.5
    grade = (match + 0.5 * document[..., 0] + 0.3 * torch.randn(queries, documents)).argsort(1)
    grade = grade.argsort(1) // 3
    x = torch.cat([query, document], dim=2)
    model = nn.Sequential(
        nn.Linear(6, 48), nn.Tanh(), nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 1)
    )
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3, alpha=0.95, momentum=0.5)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=max(1, steps // 4), gamma=0.6)

    def pairs(pick: Tensor) -> tuple[Tensor, Tensor]:
        score = model(x[pick]).squeeze(2)
        better = grade[pick][:, :, None] - grade[pick][:, None, :]
        ahead = (score[:, :, None] - score[:, None, :])[better > 0]
        weight = better[better > 0].float()
        right = (ahead > 0).float().mean()
        return (weight * F.softplus(-ahead)).sum() / weight.sum(), right

    score = None
    for step in range(1, steps + 1):
        loss, _ = pairs(torch.randint(1800, (24,)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        if step % 50 == 0:
            model.eval()
            with torch.no_grad():
                score = pairs(torch.arange(1800, 2000))[1].item()
            model.train()
        report(step, steps, loss, score)


class Tasks(nn.Module):
    """A shared trunk with heads for a number, a count and a rare event, and their weights."""

    def __init__(self, inputs: int = 16, width: int = 64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(inputs, width),
            nn.BatchNorm1d(width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.GELU(),
        )
        self.number, self.count, self.event = (nn.Linear(width, 1) for _ in range(3))
        self.logvar = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.trunk(x)
        return self.number(h).squeeze(1), self.count(h).squeeze(1), self.event(h).squeeze(1)


def focal(logits: Tensor, y: Tensor, share: float = 0.75, gamma: float = 2.0) -> Tensor:
    """Return the binary focal loss with a larger share for the rare class."""
    plain = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    right = torch.exp(-plain)
    return (torch.where(y > 0, share, 1 - share) * (1 - right) ** gamma * plain).mean()


def multitask(steps: int) -> None:
    """Learn a number, a count and a rare event together with learned task weights."""
    torch.manual_seed(7)
    count = 6000
    x = torch.randn(count, 16)
    hidden = torch.tanh(x @ torch.randn(16, 6) / 3)
    number = hidden @ torch.randn(6)
    number = (number - number.mean()) / number.std() + 0.2 * torch.randn(count)
    exposure = 0.5 + 1.5 * torch.rand(count)
    counts = torch.poisson(exposure * torch.exp(0.5 + hidden @ (0.5 * torch.randn(6))))
    events = hidden @ torch.randn(6) + 0.3 * torch.randn(count)
    events = (events > events.quantile(0.88)).float()
    known = (torch.rand(count) < 0.8).float()
    model = Tasks()
    nn.init.constant_(model.event.bias, -2.0)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if n != "logvar"]},
            {"params": [model.logvar], "weight_decay": 0.0, "lr": 5e-3},
        ],
        lr=2e-3,
        weight_decay=0.01,
    )
    scheduler = lr_scheduler.CyclicLR(
        optimizer,
        base_lr=[5e-4, 1e-3],
        max_lr=[2e-3, 5e-3],
        step_size_up=max(1, steps // 6),
        mode="triangular2",
        cycle_momentum=False,
    )

    def losses(pick: Tensor) -> Tensor:
        a, b, c = model(x[pick])
        squared = (a - number[pick]) ** 2 * known[pick]
        return torch.stack(
            [
                squared.sum() / known[pick].sum().clamp(min=1),
                F.poisson_nll_loss(
                    b + exposure[pick].log(), counts[pick], log_input=True, full=True
                ),
                focal(c, events[pick]),
            ]
        )

    score = None
    for step in range(1, steps + 1):
        parts = losses(torch.randint(5000, (64,)))
        loss = (torch.exp(-model.logvar) * parts + 0.5 * model.logvar).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            model.eval()
            with torch.no_grad():
                score = losses(torch.arange(5000, count)).sum().item()
            model.train()
        report(step, steps, parts.sum(), score)


PROGRAMS = {
    f.__name__: f
    for f in (gcn, set_transformer, recommender, survival, housing, ranking, multitask)
}


def main() -> None:
    """Run the program named on the command line."""
    if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
        sys.exit(f"usage: {sys.argv[0]} {{{','.join(PROGRAMS)}}} [STEPS]")
    PROGRAMS[sys.argv[1]](int(sys.argv[2]) if len(sys.argv) > 2 else 500)


if __name__ == "__main__":
    main()
